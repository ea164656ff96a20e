"""``/v1/estimate``: what the engine's books say, and whether it comes true."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import httpx
import pytest
import pytest_asyncio

from service.errors import Overloaded
from tests.api.fakes import BOS, FakeEngine
from tests.api.tiny import Tiny, tiny_checkpoint, tiny_server

URL = "/v1/estimate"
real = pytest.mark.asyncio(loop_scope="module")
WORK = {"prompt": [60] * 300, "max_tokens": 150, "ignore_eos": True, "logit_bias": {"198": -100}}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def tiny() -> AsyncIterator[Tiny]:
    with tiny_checkpoint() as (path, network):
        async with tiny_server(path, network, max_num_seqs=2, max_queued_requests=4) as tiny:
            yield tiny


async def timed(tiny: Tiny, **fields: object) -> float:
    began = time.monotonic()
    await tiny.ask("/v1/completions", **fields)
    return time.monotonic() - began


@real
async def test_it_comes_true_within_a_factor(tiny: Tiny) -> None:
    await timed(tiny, **WORK, cache_salt="warm")
    estimate = await tiny.ask(URL, **WORK)
    assert (estimate["prompt_tokens"], estimate["max_new_tokens"]) == (300, 150)
    assert (estimate["cached_tokens"], estimate["queue_seconds"]) == (0, 0)
    took = await timed(tiny, **WORK)
    assert estimate["total_seconds"] / 5 < took < estimate["total_seconds"] * 5
    parts = sum(estimate[f"{name}_seconds"] for name in ("queue", "prefill", "decode"))
    assert parts == pytest.approx(estimate["total_seconds"])


@real
async def test_asking_changes_nothing_and_sees_the_cache(tiny: Tiny) -> None:
    fields = WORK | {"prompt": [61] * 200}
    before = await tiny.ask(URL, **fields)
    assert (await tiny.ask(URL, **fields))["cached_tokens"] == before["cached_tokens"] == 0
    await tiny.ask("/v1/completions", **fields)
    after = await tiny.ask(URL, **fields)
    assert after["cached_tokens"] >= 192
    assert after["prefill_seconds"] < before["prefill_seconds"]
    other = await tiny.ask(URL, **fields, cache_salt="other")
    assert other["cached_tokens"] == 0


@real
async def test_a_queue_is_foreseen_and_a_full_one_refuses(tiny: Tiny) -> None:
    work = [asyncio.create_task(timed(tiny, **WORK, cache_salt=str(i))) for i in range(4)]
    while tiny.engine.state.waiting < 2:  # noqa: ASYNC110
        await asyncio.sleep(0.005)
    estimate = await tiny.ask(URL, **WORK, cache_salt="mine")
    assert estimate["would_be_admitted"]
    assert estimate["queue_seconds"] > 0
    first = await tiny.ask(URL, **WORK, priority=-1)
    assert first["queue_seconds"] < estimate["queue_seconds"]
    refused = await tiny.ask(URL, **WORK, n=4)
    assert not refused["would_be_admitted"]
    assert refused["reason"]["code"] == "queue_full"
    assert refused["reason"]["retry_after"] >= 1
    rest = await asyncio.gather(*work)
    assert estimate["queue_seconds"] < 5 * max(rest)
    rejected = tiny.engine.state.counters.get("rejected_queue_full", 0)
    assert rejected == 0


async def test_chat_and_completions_are_asked_about_alike(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.cached = 2
    answer = (await client.post(URL, json={"prompt": ["ab", "c"], "n": 2, "max_tokens": 5})).json()
    assert (answer["prompt_tokens"], answer["max_new_tokens"]) == (5, 20)
    assert (answer["cached_tokens"], answer["total_seconds"]) == (2, 0.5)
    assert (answer["would_be_admitted"], answer["reason"]) == (True, None)
    assert [one.prompt for one in engine.asked_about] == [[BOS, *b"ab"], [BOS, *b"c"]]
    assert not engine.submitted
    body = {"messages": [{"role": "user", "content": "Hi"}]}
    answer = (await client.post(URL, json=body)).json()
    assert answer["max_new_tokens"] == 200 - answer["prompt_tokens"]


async def test_what_does_not_fit_or_is_refused_is_said(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    answer = (await client.post(URL, json={"prompt": "x", "max_tokens": 500})).json()
    assert (answer["fits_context"], answer["would_be_admitted"]) == (False, False)
    assert answer["reason"]["code"] == "context_length_exceeded"
    assert answer["max_model_len"] == 200
    engine.refusal = Overloaded("full", retry_after=3.0)
    answer = (await client.post(URL, json={"prompt": "x"})).json()
    assert (answer["fits_context"], answer["would_be_admitted"]) == (True, False)
    assert answer["reason"] == {"message": "full", "code": "queue_full", "retry_after": 3.0}
    assert answer["queue_seconds"] is None


@pytest.mark.parametrize("body", [{}, {"prompt": "a", "messages": []}, {"prompt": ""}, [1]])
async def test_a_body_is_one_of_the_two(client: httpx.AsyncClient, body: object) -> None:
    response = await client.post(URL, json=body)
    assert response.status_code == 400
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
