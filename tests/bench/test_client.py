"""What a request's trace says of servers that answer well, badly, or not at all."""

from __future__ import annotations

import asyncio

import pytest

from service.bench.client import Target, Trace, fetch, stream
from service.bench.load import Asking
from service.bench.problem import BenchProblem
from service.bench.workload import Job
from tests.bench.scripted_server import Call, Talk, answer, answering, text, usage

JOB = Job([5, 6, 7], 3)


async def traced(talk: Talk, patience: float = 5.0) -> Trace:
    asking = Asking()
    async with answering(talk) as server:
        return await stream(Target(server.url, timeout=patience), asking.path, asking.body(JOB))


async def test_a_good_answer_is_timed_and_counted() -> None:
    async def talk(call: Call) -> None:
        await call.begin()
        await call.event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        for _ in range(3):
            await asyncio.sleep(0.02)
            await call.event(text("a"))
        await call.event(usage(3, prompt=9, cached=8))
        await call.event(b"[DONE]")
        await call.end()

    trace = await traced(talk)
    assert trace.is_good, trace.detail
    assert (trace.tokens, trace.prompt_tokens, trace.cached_tokens) == (3, 9, 8)
    assert len(trace.chunks) == 3
    assert trace.first_token >= 0.02
    assert min(trace.gaps) > 0.005
    assert trace.end >= trace.chunks[-1]


async def test_the_request_carries_what_was_asked_for() -> None:
    async with answering(answer) as server:
        target = Target(f"{server.url}/v1/", api_key="secret")
        asking = Asking(model="m", extra={"top_k": 4})
        assert (await stream(target, asking.path, asking.body(JOB))).is_good
    call = server.calls[0]
    assert call.path == "/v1/completions"
    assert call.headers["authorization"] == "Bearer secret"
    assert call.body == {
        "prompt": [5, 6, 7],
        "max_tokens": 3,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
        "model": "m",
        "top_k": 4,
    }


async def test_a_chat_sends_a_message() -> None:
    asking = Asking("chat", ignore_eos=False, include_usage=False)
    assert asking.path == "/v1/chat/completions"
    assert asking.body(Job("hello", 3)) == {
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 3,
        "temperature": 0,
        "stream": True,
    }


async def test_events_split_over_chunks_are_put_together() -> None:
    async def talk(call: Call) -> None:
        await call.begin()
        data = b'data: {"choices":[{"text":"a","finish_reason":"stop"}]}\n\n'
        for place in range(0, len(data), 7):
            await call.chunk(data[place : place + 7])
            await asyncio.sleep(0)
        await call.end()

    trace = await traced(talk)
    assert trace.is_good, trace.detail
    assert trace.tokens == 1, "without usage a piece of text counts as a token"


async def test_an_answer_without_chunks_ends_where_the_server_hangs_up() -> None:
    async def talk(call: Call) -> None:
        await call.say(b"HTTP/1.0 200 OK\r\n\r\n")
        await call.say(b'data: {"choices":[{"text":"a","finish_reason":"stop"}]}\n\n')

    assert (await traced(talk)).is_good


async def test_half_a_character_is_a_token_that_came_with_the_end() -> None:
    async def talk(call: Call) -> None:
        await call.begin()
        await call.event(text("", "length"))
        await call.event(usage(1))
        await call.end()

    trace = await traced(talk)
    assert trace.is_good, trace.detail
    assert len(trace.chunks) == 1


async def refuses(call: Call) -> None:
    await call.whole("429 Too Many Requests", {"error": {"message": "queue full"}})


async def fails(call: Call) -> None:
    await call.whole("500 Internal Server Error", b"oops")


async def hangs(call: Call) -> None:
    await call.begin()
    await call.event(text("a"))
    await asyncio.sleep(3)


async def hangs_up(call: Call) -> None:
    await call.begin()
    await call.event(text("a"))


async def says_nothing(call: Call) -> None:
    pass


async def is_no_http_server(call: Call) -> None:
    await call.say(b"SSH-2.0-OpenSSH\r\n")


async def loses_its_chunks(call: Call) -> None:
    await call.begin()
    await call.say(b"zz\r\n")


async def loses_its_json(call: Call) -> None:
    await call.begin()
    await call.event(b"{nonsense")


async def ends_early(call: Call) -> None:
    await call.begin()
    await call.event(text("a"))
    await call.end()


async def fails_later(call: Call) -> None:
    await call.begin()
    await call.event(text("a"))
    await call.event({"error": {"message": "the engine died"}})
    await call.event(b"[DONE]")
    await call.end()


async def answers_nothing(call: Call) -> None:
    await call.begin()
    await call.event(b"[DONE]")
    await call.end()


@pytest.mark.parametrize(
    ("talk", "kind", "detail"),
    [
        (refuses, "refused", "queue full"),
        (fails, "http 500", "oops"),
        (hangs, "timeout", "no whole answer"),
        (hangs_up, "broken connection", "ended in its middle"),
        (says_nothing, "broken answer", "no HTTP answer"),
        (is_no_http_server, "broken answer", "SSH"),
        (loses_its_chunks, "broken answer", "no chunk size"),
        (loses_its_json, "broken answer", "nonsense"),
        (ends_early, "broken answer", "without [DONE]"),
        (fails_later, "error event", "the engine died"),
        (answers_nothing, "empty answer", "not one token"),
    ],
)
async def test_each_failure_has_its_kind(talk: Talk, kind: str, detail: str) -> None:
    trace = await traced(talk, patience=0.3)
    assert trace.failure == kind
    assert detail in trace.detail
    assert trace.end > trace.start


async def test_nobody_listening_is_a_failed_connection() -> None:
    trace = await stream(Target("http://127.0.0.1:1"), "/v1/completions", {})
    assert trace.failure == "connection"


async def test_a_document_is_read_whole() -> None:
    async with answering(answer) as server:
        status, _, body = await fetch(Target(server.url), "/v1/models")
    assert (status, body) == (200, b'{"data": [{"id": "scripted"}]}')


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://x", "http://"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(BenchProblem, match="no address"):
        Target(url)
