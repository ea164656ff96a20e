"""``/v1/embeddings``: the network's own hidden states, pooled, however the text was scheduled."""

from __future__ import annotations

import asyncio
import base64
import struct
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
import torch
from transformers import LlamaForCausalLM

from service.errors import Overloaded
from tests.api.fakes import BOS, FakeEngine
from tests.api.tiny import Tiny, tiny_checkpoint, tiny_server
from tests.engine.checkpoints import NAN_TOKEN
from tests.model.peft_folders import ALL, merged, random_adapter, tensors_of, write_folder

URL = "/v1/embeddings"
real = pytest.mark.asyncio(loop_scope="module")
LONG = [BOS, *b"A text that is longer than a step's budget of 48 tokens, so it is cut. " * 3]
TEXTS = ["The sea was calm.", "Short", "A ship that sailed to the north. " * 6]


Folder = tuple[Path, LlamaForCausalLM]


@pytest.fixture(scope="module")
def network_folder() -> Iterator[Folder]:
    with tiny_checkpoint() as found:
        yield found


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def tiny(network_folder: Folder) -> AsyncIterator[Tiny]:
    async with tiny_server(*network_folder) as tiny:
        yield tiny


def expected(tiny: Tiny, ids: list[int], pooling: str, size: int | None = None) -> torch.Tensor:
    states = tiny.states(ids)
    pooled = states.mean(0) if pooling == "mean" else states[-1]
    pooled = pooled[:size]
    return pooled / pooled.norm()


def close(found: list[float], wanted: torch.Tensor) -> bool:
    return torch.allclose(torch.tensor(found, dtype=torch.float64), wanted, atol=1e-4, rtol=0)


async def embed(tiny: Tiny, texts: Any, **fields: Any) -> list[list[float]]:
    answer = await tiny.ask(URL, input=texts, **fields)
    assert [one["index"] for one in answer["data"]] == list(range(len(answer["data"])))
    return [one["embedding"] for one in answer["data"]]


@real
@pytest.mark.parametrize("pooling", ["mean", "last"])
async def test_they_are_the_networks_hidden_states(tiny: Tiny, pooling: str) -> None:
    for ids in ([70], [BOS, *b"The sea"], LONG):
        (found,) = await embed(tiny, ids, pooling=pooling)
        assert close(found, expected(tiny, ids, pooling))
        (again,) = await embed(tiny, ids, pooling=pooling)  # now much of it is in the cache
        assert close(again, expected(tiny, ids, pooling))


@real
async def test_they_are_the_same_alone_and_among_others(tiny: Tiny) -> None:
    async def generate() -> None:
        fields = {"prompt": "A story", "max_tokens": 60, "ignore_eos": True, "n": 3}
        await tiny.ask("/v1/completions", **fields, logit_bias={str(NAN_TOKEN): -100})

    alone = [(await embed(tiny, text))[0] for text in TEXTS]
    others = [asyncio.create_task(generate()) for _ in range(3)]
    together = await embed(tiny, TEXTS)
    await asyncio.gather(*others)
    for text, one, other in zip(TEXTS, alone, together, strict=True):
        wanted = expected(tiny, [BOS, *text.encode()], "mean")
        assert close(one, wanted)
        assert close(other, wanted)


@real
async def test_the_compiled_kernels_give_them_too(network_folder: Folder) -> None:
    """In bfloat16, where the processor has the instructions: near, and the same bits in a batch."""
    path, network = network_folder
    async with tiny_server(path, network, dtype="bfloat16") as tiny:
        for pooling in ("mean", "last"):
            alone = [(await embed(tiny, text, pooling=pooling))[0] for text in TEXTS]
            assert await embed(tiny, TEXTS, pooling=pooling) == alone
            for text, one in zip(TEXTS, alone, strict=True):
                wanted = expected(tiny, [BOS, *text.encode()], pooling)
                assert float(torch.tensor(one).double() @ wanted) > 0.99


@real
async def test_an_adapter_has_embeddings_of_its_own(network_folder: Folder) -> None:
    path, network = network_folder
    adapter = random_adapter(network, ALL, seed=3)
    write_folder(path.parent / "a", tensors_of(adapter), target_modules=list(ALL))
    limits = {"adapters": {"a": str(path.parent / "a")}, "max_loras": 1, "max_lora_rank": 8}
    async with tiny_server(path, network, **limits) as tiny:
        changed = replace(tiny, network=merged(network, adapter, 2.0))
        ids = [BOS, *b"The sea was calm. " * 4]
        both = await asyncio.gather(
            embed(tiny, ids, model="a"), embed(tiny, ids), embed(tiny, ids, model="a")
        )
        assert close(both[0][0], expected(changed, ids, "mean"))
        assert close(both[1][0], expected(tiny, ids, "mean"))
        assert not close(both[0][0], expected(tiny, ids, "mean"))
        assert both[2] == both[0]


@real
async def test_fewer_dimensions_are_the_first_ones(tiny: Tiny) -> None:
    ids = [BOS, *b"The sea"]
    (found,) = await embed(tiny, ids, dimensions=10)
    assert len(found) == 10
    assert close(found, expected(tiny, ids, "mean", 10))


@real
async def test_base64_holds_the_same_numbers(tiny: Tiny) -> None:
    (plain,) = await embed(tiny, "The sea")
    (coded,) = await embed(tiny, "The sea", encoding_format="base64")
    raw = base64.b64decode(coded)
    assert list(struct.unpack(f"<{len(raw) // 4}f", raw)) == pytest.approx(plain, abs=1e-7)


@real
async def test_long_texts_are_cut_where_it_is_asked_for(tiny: Tiny) -> None:
    ids = [BOS, *b"The sea was calm"]
    for side, kept in (("right", ids[:5]), ("left", ids[-5:])):
        (found,) = await embed(tiny, ids, truncate_prompt_tokens=5, truncation_side=side)
        assert close(found, expected(tiny, kept, "mean"))
    (found,) = await embed(tiny, [70] * 600, truncate_prompt_tokens=-1)
    assert close(found, expected(tiny, [70] * 512, "mean"))


@real
async def test_a_bad_row_fails_alone(tiny: Tiny) -> None:
    good, bad = await asyncio.gather(
        embed(tiny, "The sea"), tiny.http.post(URL, json={"input": [65, 198, 66]})
    )
    assert close(good[0], expected(tiny, [BOS, *b"The sea"], "mean"))
    assert bad.status_code == 500
    assert bad.json()["error"]["code"] == "engine_failure"


@real
async def test_usage_counts_every_input(tiny: Tiny) -> None:
    answer = await tiny.ask(URL, input=[[65, 66], [67]], model="tiny", user="me")
    assert answer["usage"] == {"prompt_tokens": 3, "total_tokens": 3}
    assert (answer["object"], answer["model"]) == ("list", "tiny")
    assert {one["object"] for one in answer["data"]} == {"embedding"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "input"),
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": [""]}, "input"),
        ({"input": [264]}, "input[0]"),
        ({"input": [[1], [999]]}, "input[1][0]"),
        ({"input": "x", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "x", "dimensions": 0}, "dimensions"),
        ({"input": "x", "dimensions": 65}, "dimensions"),
        ({"input": "x", "pooling": "max"}, "pooling"),
        ({"input": "x", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"input": "x" * 500}, "input"),
    ],
)
async def test_wrong_requests_name_their_field(
    client: httpx.AsyncClient, engine: FakeEngine, fields: dict[str, Any], param: str
) -> None:
    engine.pooled = struct.pack("<64f", *range(64))
    response = await client.post(URL, json=fields)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


async def test_the_engine_is_asked_for_no_token(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.pooled = struct.pack("<2f", 3.0, 4.0)
    response = await client.post(URL, json={"input": ["a", "b"], "pooling": "last"})
    for one in response.json()["data"]:
        assert one["embedding"] == pytest.approx([0.6, 0.8])
    assert [one["pooling"] for one in engine.submitted] == ["last"] * 2
    assert engine.submitted[0]["settings"][0].max_tokens == 0
    assert engine.live == 0


async def test_a_full_queue_is_a_429(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.refusal = Overloaded("full", retry_after=2)
    response = await client.post(URL, json={"input": "a"})
    assert (response.status_code, response.headers["Retry-After"]) == (429, "2")


async def test_unknown_fields_are_named(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.pooled = struct.pack("<2f", 3.0, 4.0)
    response = await client.post(URL, json={"input": "a", "input_type": "query"})
    assert response.headers["X-Ignored-Params"] == "input_type"


async def test_null_is_no_input(client: httpx.AsyncClient) -> None:
    response = await client.post(URL, json={"input": None})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "input")
