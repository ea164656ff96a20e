"""Two keys, one engine, the same texts: whatever a client sends, it finds no other key's prefix.

A hit is what the engine's own counters and the usage of an answer say, over every route that reads
the prefix cache. That those see hits at all is looked at each time, with the key that made them.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from service.api.app import create_app
from service.registry import ModelRegistry
from service.settings import Settings
from tests.api.fakes import FakeEngine, served
from tests.api.tiny import Tiny, tiny_checkpoint, tiny_server
from tests.model.peft_folders import random_adapter, tensors_of, write_folder

pytestmark = pytest.mark.asyncio(loop_scope="module")

OURS, THEIRS = "key-of-the-victim", "key-of-the-attacker"
OUR_ID = hashlib.sha256(OURS.encode()).hexdigest()[:16]
LONG = "The patient's file says that the fever began on a Sunday and has not gone since. " * 2
BAN = {"logit_bias": {"198": -100}}  # the network has no finite number for it


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def tiny() -> AsyncIterator[Tiny]:
    with tiny_checkpoint() as (path, network):
        adapter = path.parent / "adapter"
        write_folder(adapter, tensors_of(random_adapter(network, seed=1)))
        keys = {"api_key": [OURS, THEIRS], "metrics_public": True}
        async with tiny_server(
            path, network, keys, max_loras=1, adapters={"tuned": str(adapter)}
        ) as tiny:
            yield tiny


async def ask(
    tiny: Tiny, key: str, path: str, body: dict[str, Any], **headers: str
) -> dict[str, Any]:
    sent = {"Authorization": f"Bearer {key}"} | headers
    response = await tiny.http.post(path, json=body, headers=sent)
    assert response.status_code == 200, response.text
    return dict(response.json())


async def scrape(tiny: Tiny, name: str) -> float:
    """Once the engine, asked for a sign of life, has told of all it did."""
    await tiny.engine.ping()
    text = (await tiny.http.get("/metrics")).text
    lines = [line for line in text.splitlines() if line.startswith(f"vllm:{name}_total")]
    assert lines
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


async def hits(tiny: Tiny, key: str, path: str, body: dict[str, Any]) -> float:
    """Prompt tokens found cached, as ``/metrics`` counts them."""
    asked, found = [await scrape(tiny, f"prefix_cache_{what}") for what in ("queries", "hits")]
    await ask(tiny, key, path, body)
    assert await scrape(tiny, "prefix_cache_queries") > asked
    return await scrape(tiny, "prefix_cache_hits") - found


def text(name: str) -> str:
    """The same for both keys, another one for each test."""
    return f"{name}: {LONG}"


def messages(name: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text(name)}]


ROUTES = {
    "completions": ("/v1/completions", {"prompt": text("c"), "max_tokens": 1, **BAN}),
    "echo": ("/v1/completions", {"prompt": text("e"), "max_tokens": 1, "n": 2, **BAN}),
    "beams": (
        "/v1/completions",
        {"prompt": text("b"), "max_tokens": 2, "use_beam_search": True, "n": 2},
    ),
    "adapter": (
        "/v1/completions",
        {"model": "tuned", "prompt": text("a"), "max_tokens": 1, **BAN},
    ),
    "chat": ("/v1/chat/completions", {"messages": messages("m"), "max_tokens": 1, **BAN}),
    "responses": ("/v1/responses", {"input": text("r"), "max_output_tokens": 16}),
    "messages": ("/v1/messages", {"messages": messages("s"), "max_tokens": 1, "model": "tiny"}),
    "embeddings": ("/v1/embeddings", {"input": text("v"), "pooling": "last"}),
    "score": ("/v1/score", {"text_1": text("q"), "text_2": "yes"}),
    "rerank": ("/v1/rerank", {"query": "yes", "documents": [text("d")]}),
}


@pytest.mark.parametrize("name", ROUTES)
async def test_no_hit_across_keys_and_hits_within_one(tiny: Tiny, name: str) -> None:
    path, body = ROUTES[name]
    first = await hits(tiny, OURS, path, body)
    across = await hits(tiny, THEIRS, path, body)
    within = await hits(tiny, OURS, path, body)
    assert across == first, "what another key sent changes nothing"
    assert within >= first + 64


@pytest.mark.parametrize("name", ["completions", "chat", "responses", "messages"])
async def test_usage_tells_of_ones_own_cache_alone(tiny: Tiny, name: str) -> None:
    path, body = ROUTES[name]
    await ask(tiny, OURS, path, body | {"cache_salt": "usage"})
    across = await ask(tiny, THEIRS, path, body | {"cache_salt": "usage"})
    within = await ask(tiny, OURS, path, body | {"cache_salt": "usage"})
    assert cached(across) == 0
    assert cached(within) >= 64


def cached(answer: dict[str, Any]) -> int:
    usage = answer["usage"]
    if "cache_read_input_tokens" in usage:
        return int(usage["cache_read_input_tokens"])
    details = usage.get("prompt_tokens_details") or usage["input_tokens_details"]
    return int(details["cached_tokens"])


async def test_an_estimate_tells_of_ones_own_cache_alone(tiny: Tiny) -> None:
    body = {"prompt": text("estimate"), "max_tokens": 1, **BAN}
    cold = await ask(tiny, THEIRS, "/v1/estimate", body)
    await ask(tiny, OURS, "/v1/completions", body)
    across = await ask(tiny, THEIRS, "/v1/estimate", body)
    within = await ask(tiny, OURS, "/v1/estimate", body)
    assert cold["cached_tokens"] == across["cached_tokens"] == 0
    assert within["cached_tokens"] >= 64


CLAIMS: list[dict[str, Any]] = [
    *({"cache_salt": salt} for salt in (None, OURS, OUR_ID, f"{OUR_ID}\0", "\0")),
    {"user": OURS},
    {"user": OUR_ID},
    {"safety_identifier": OUR_ID},
    {"prompt_cache_key": OUR_ID},
    {"metadata": {"key": OUR_ID, "account": OUR_ID}},
    {"account": OUR_ID, "namespace": OUR_ID, "key_id": OUR_ID, "caller": {"id": OUR_ID}},
    {"priority": -1},
    {"n": 2},
]
HEADERS = [
    {"X-Request-Id": OUR_ID},
    {"OpenAI-Organization": OUR_ID, "OpenAI-Project": OUR_ID},
    {"X-User-Id": OUR_ID, "X-Forwarded-User": OUR_ID, "X-Account": OUR_ID},
    {"X-Forwarded-For": "127.0.0.1", "Forwarded": "for=127.0.0.1"},
    {"Cookie": f"key={OURS}"},
]


async def test_no_field_and_no_header_names_anothers_namespace(tiny: Tiny) -> None:
    """Each claim comes first of its key, after the other key sent the same, with and without."""
    claims = [(claim, {}) for claim in CLAIMS] + [({}, header) for header in HEADERS]
    for number, (claim, headers) in enumerate(claims):
        body = {"prompt": text(f"claim {number}"), "max_tokens": 1, **BAN}
        for sent in (body, body | claim):
            await ask(tiny, OURS, "/v1/completions", sent, **headers)
        across = await ask(tiny, THEIRS, "/v1/completions", body | claim, **headers)
        within = await ask(tiny, OURS, "/v1/completions", body | claim, **headers)
        assert cached(across) == 0, (claim, headers)
        assert cached(within) >= 64, (claim, headers)


async def test_a_salt_narrows_within_one_key(tiny: Tiny) -> None:
    body = {"prompt": text("salt"), "max_tokens": 1, **BAN}
    await ask(tiny, OURS, "/v1/completions", body | {"cache_salt": "one"})
    assert cached(await ask(tiny, OURS, "/v1/completions", body)) == 0
    assert cached(await ask(tiny, OURS, "/v1/completions", body | {"cache_salt": "two"})) == 0
    assert cached(await ask(tiny, OURS, "/v1/completions", body | {"cache_salt": "one"})) >= 64


async def test_host_memory_gives_back_to_the_key_that_filled_it() -> None:
    """A cache of one prompt: the next one pushes it out, to host memory."""
    body = {"prompt": text("host"), "max_tokens": 1, **BAN}
    with tiny_checkpoint() as (path, network):
        async with tiny_server(
            path, network, {"api_key": [OURS, THEIRS]}, num_kv_blocks=9, host_cache_memory=1 << 24
        ) as tiny:
            await ask(tiny, OURS, "/v1/completions", body)
            across = await ask(tiny, THEIRS, "/v1/completions", body)
            assert cached(across) == 0
            other = {"prompt": text("another")[:240]}
            await ask(tiny, THEIRS, "/v1/completions", body | other)
            again = await ask(tiny, OURS, "/v1/completions", body)
            assert cached(again) >= 64
            await tiny.engine.ping()
            assert tiny.engine.state.counters["host_loads"]


async def test_a_restarted_server_names_prefixes_anew() -> None:
    models = ModelRegistry([served(FakeEngine())])
    one, two = (create_app(Settings(), models).state.server for _ in range(2))
    assert one.namespace("key", "salt") == one.namespace("key", "salt")
    assert one.namespace("key", "salt") != two.namespace("key", "salt")


async def test_key_and_salt_cannot_be_shifted_into_each_other() -> None:
    models = ModelRegistry([served(FakeEngine())])
    server = create_app(Settings(), models).state.server
    pairs = [("a", "b"), ("ab", ""), ("a\0b", ""), ("a", "\0b"), ("", "ab"), ("", "a\0b")]
    assert len({server.namespace(*pair) for pair in pairs}) == len(pairs)
