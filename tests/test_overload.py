"""A burst many times what a server takes: each request has one of two ends, and nothing stays."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from tests.running import Running, serving
from tests.traffic.client import Answer, Client
from tests.traffic.processes import read_books, watching

SLOTS, QUEUE = 4, 12
BURST = 400  # 25 times what fits
MEMORY = 48  # MiB the second burst may take more than the first: a bound, not a measurement
CHAT = {"messages": [{"role": "user", "content": "Tell me a story."}]}
USAGE = {"stream": True, "stream_options": {"include_usage": True}}
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": "Once upon a time", "max_tokens": 12}),
    ("/v1/completions", {"prompt": "Once upon a time", "max_tokens": 12, **USAGE}),
    ("/v1/chat/completions", {**CHAT, "max_tokens": 12, **USAGE}),
]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    limits = ("--max-num-seqs", str(SLOTS), "--max-queued-requests", str(QUEUE))
    with serving("--no-sample", "--threads", "1", *limits) as server:
        yield server


async def burst(url: str) -> list[Answer]:
    """All at once, each over a connection of its own."""
    client = Client(url, reuse=False)
    asked = [KINDS[number % len(KINDS)] for number in range(BURST)]
    return await asyncio.gather(
        *(client.post(path, body | {"ignore_eos": True}) for path, body in asked)
    )


async def settled(url: str) -> dict[str, float]:
    """The books once nobody is left, which must be soon."""
    for _ in range(200):
        books = await read_books(url)
        gauges = ("vllm:num_requests_running", "vllm:num_requests_waiting")
        if not any(books[name] for name in (*gauges, "pronk:requests_in_flight")):
            return books
        await asyncio.sleep(0.05)
    raise AssertionError("somebody is still there")


async def test_every_request_of_a_burst_is_answered_or_refused_and_the_books_say_so(
    server: Running,
) -> None:
    async with watching(server.url, server.process.pid, 0.2) as watch:
        first = await burst(server.url)
        before = await watch.sample(0.0)
        second = await burst(server.url)
        books = await settled(server.url)
        after = await watch.sample(0.0)
    answers = first + second
    endings = Counter(answer.ending for answer in answers)
    assert endings.keys() == {"done", "refused"}, endings
    assert endings["done"] >= 2 * (SLOTS + QUEUE), "a burst fills every place"
    for answer in answers:
        if answer.is_done:
            assert answer.tokens == 12
        else:
            assert answer.status == 429
            assert 1 <= (answer.retry_after or 0) <= 60
            assert b"queue_full" in answer.text
    assert books["pronk:requests_received_total"] == len(answers)
    assert books["pronk:requests_finished_total"] == endings["done"]
    assert books["pronk:requests_rejected_total"] == endings["refused"]
    assert books["vllm:admission_rejections_total:queue_full"] == endings["refused"]
    assert books["pronk:requests_failed_total"] == books["pronk:requests_cancelled_total"] == 0
    assert books["vllm:generation_tokens_total"] == 12 * endings["done"]
    assert books["vllm:kv_cache_usage_perc"] == 0
    assert all(sample.livez < 30 and sample.ready for sample in watch.samples)
    assert after.http_rss - before.http_rss < MEMORY
    assert after.engine_rss - before.engine_rss < MEMORY
    assert after.num_fds <= before.num_fds + 16


async def test_whoever_comes_again_when_told_is_let_in(server: Running) -> None:
    """Three times what fits, all of them patient: every one is served in the end."""
    client = Client(server.url)

    async def patient() -> int:
        for refusals in range(40):
            answer = await client.post("/v1/completions", KINDS[0][1] | {"ignore_eos": True})
            if answer.is_done:
                return refusals
            assert answer.ending == "refused", answer
            await asyncio.sleep(answer.retry_after or 0)
        raise AssertionError("told forty times to come again")

    refusals = await asyncio.gather(*(patient() for _ in range(3 * (SLOTS + QUEUE))))
    assert refusals.count(0) >= SLOTS + QUEUE
    assert max(refusals) <= 8
    await client.close()
