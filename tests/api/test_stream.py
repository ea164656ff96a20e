"""Streams: joined they are the whole answer, they end exactly once, they live while silent."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import given, settings
from hypothesis import strategies as st

from service.api.app import create_app
from service.errors import Overloaded
from service.registry import ModelRegistry
from service.settings import Settings
from tests.api.conftest import Reader, chunks_of, scope_of, talking_to, until
from tests.api.fakes import EOS, VOCABULARY, FakeEngine, say, served

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


def join_completion(chunks: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Choices by index, as a client adds a stream up; asserts one finish reason each."""
    joined: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            so_far = joined.setdefault(choice["index"], {"text": "", "ids": [], "logprobs": []})
            assert "finish_reason" not in so_far, "nothing comes after the end of a choice"
            so_far["text"] += choice["text"]
            so_far["ids"] += choice.get("token_ids", [])
            if choice["logprobs"]:
                so_far["logprobs"] += zip(*choice["logprobs"].values(), strict=True)
            if choice["finish_reason"]:
                so_far["finish_reason"] = choice["finish_reason"]
                so_far["stop_reason"] = choice["stop_reason"]
    assert all("finish_reason" in choice for choice in joined.values())
    return joined


def join_whole(answer: dict[str, Any]) -> dict[int, dict[str, Any]]:
    return join_completion([answer])


async def test_a_stream_is_framed_and_ends_once(client: httpx.AsyncClient) -> None:
    response = await client.post(COMPLETIONS, json={"prompt": "Hi", "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-accel-buffering"] == "no"
    assert response.headers["cache-control"] == "no-cache, no-store"
    assert "content-length" not in response.headers
    chunks = chunks_of(response.text)
    assert join_completion(chunks)[0]["text"] == "Hello, world"
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all("usage" not in chunk for chunk in chunks)
    assert set(chunks[0]) == {"id", "object", "created", "model", "system_fingerprint", "choices"}


async def test_usage_comes_last_with_empty_choices_and_is_null_before(
    client: httpx.AsyncClient,
) -> None:
    body = {"prompt": "Hi", "stream": True, "stream_options": {"include_usage": True}}
    chunks = chunks_of((await client.post(COMPLETIONS, json=body)).text)
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 13


async def test_running_usage_counts_up_to_the_whole(client: httpx.AsyncClient) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"prompt": "Hi", "stream": True, "stream_options": options}
    chunks = chunks_of((await client.post(COMPLETIONS, json=body)).text)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (1, 13)


TOKENS = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=30)
FIELDS = st.fixed_dictionaries(
    {
        "prompt": st.sampled_from(["Hi", ["a", "b"], [[1, 2], [3]], [5, 6]]),
        "max_tokens": st.integers(1, 40),
        "n": st.integers(1, 3),
        "stop": st.lists(st.sampled_from(["ab", "STO", "b", "é", "\ufffd", "the"]), max_size=3),
        "include_stop_str_in_output": st.booleans(),
        "logprobs": st.none() | st.integers(0, 3),
        "echo": st.booleans(),
        "return_token_ids": st.booleans(),
        "skip_special_tokens": st.booleans(),
        "ignore_eos": st.booleans(),
        "stop_token_ids": st.lists(st.integers(0, VOCABULARY - 1), max_size=2),
        "min_tokens": st.just(0) | st.just(1),
    }
)


@settings(max_examples=120, deadline=None)
@given(tokens=TOKENS, fields=FIELDS, group=st.integers(1, 5))
async def test_a_stream_joined_is_the_whole_answer(
    tokens: list[int], fields: dict[str, Any], group: int
) -> None:
    words = [*tokens, *b"STO", 97, 98]
    engine = FakeEngine(script=lambda prompt, one: words[one.choice :], group=group)
    app = create_app(Settings(), ModelRegistry([served(engine)]))
    async with talking_to(app) as client:
        whole = (await client.post(COMPLETIONS, json=fields)).json()
        engine.group = 1
        streaming = {"stream": True, "stream_options": {"include_usage": True}}
        response = await client.post(COMPLETIONS, json=fields | streaming)
    chunks = chunks_of(response.text)
    assert join_completion(chunks) == join_whole(whole)
    assert chunks[-1]["usage"] == whole["usage"]
    assert engine.live == 0


@settings(max_examples=60, deadline=None)
@given(text=st.text("abcé", max_size=30), stops=st.lists(st.text("abcé", min_size=1, max_size=3)))
async def test_no_beginning_of_a_stop_string_ever_leaves(text: str, stops: list[str]) -> None:
    stops = stops[:4]
    engine = FakeEngine(script=lambda prompt, one: say(text))
    app = create_app(Settings(), ModelRegistry([served(engine)]))
    async with talking_to(app) as client:
        body = {"prompt": "Hi", "max_tokens": 100, "stop": stops}
        whole = (await client.post(COMPLETIONS, json=body)).json()["choices"][0]["text"]
        response = await client.post(COMPLETIONS, json=body | {"stream": True})
    shown = ""
    for chunk in chunks_of(response.text):
        shown += chunk["choices"][0]["text"]
        assert whole.startswith(shown)
    assert not any(stop in shown for stop in stops)


async def test_a_chat_stream_opens_with_the_role_and_joins_to_the_whole(
    client: httpx.AsyncClient,
) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], "n": 2}
    whole = (await client.post(CHAT, json=body)).json()
    chunks = chunks_of((await client.post(CHAT, json=body | {"stream": True})).text)
    assert chunks[0]["object"] == "chat.completion.chunk"
    for index in (0, 1):
        deltas = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert deltas[0]["delta"] == {"role": "assistant", "content": ""}
        text = "".join(delta["delta"].get("content", "") for delta in deltas)
        assert text == whole["choices"][index]["message"]["content"]
        assert [delta["finish_reason"] for delta in deltas if delta["finish_reason"]] == ["stop"]


# ---- failures and refusals


@pytest.mark.parametrize("url", [COMPLETIONS, CHAT])
async def test_a_failure_mid_stream_is_the_terminal_event(
    client: httpx.AsyncClient, engine: FakeEngine, url: str
) -> None:
    engine.fail_after = 3
    body: dict[str, Any] = {"stream": True}
    body |= (
        {"prompt": "Hi"}
        if url == COMPLETIONS
        else {"messages": [{"role": "user", "content": "Hi"}]}
    )
    response = await client.post(url, json=body)
    assert response.status_code == 200
    *before, last = chunks_of(response.text)
    assert last["error"]["type"] == "server_error"
    assert last["error"]["code"] == "engine_failure"
    assert all(choice["finish_reason"] is None for c in before for choice in c["choices"])
    assert engine.live == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_a_failure_before_the_first_byte_has_a_status(
    client: httpx.AsyncClient, engine: FakeEngine, stream: bool
) -> None:
    engine.fail_after = 0
    response = await client.post(COMPLETIONS, json={"prompt": "Hi", "stream": stream})
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "engine_failure"


async def test_a_failure_of_one_prompt_ends_the_whole_answer(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.fail_after = 2
    response = await client.post(COMPLETIONS, json={"prompt": ["a", "b"], "stream": True})
    assert chunks_of(response.text)[-1]["error"]["code"] == "engine_failure"
    assert engine.live == 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["Hi", ["a", "b", "c"]])
async def test_a_full_queue_is_a_status_and_says_when_to_come_back(
    client: httpx.AsyncClient, engine: FakeEngine, stream: bool, prompt: Any
) -> None:
    engine.refusal = Overloaded("The queue is full.", retry_after=2.3)
    response = await client.post(COMPLETIONS, json={"prompt": prompt, "stream": stream})
    assert response.status_code == 429
    assert response.headers["retry-after"] == "3"
    assert response.json()["error"]["code"] == "queue_full"
    assert response.json()["error"]["type"] == "overloaded_error"


# ---- silence and slow readers


async def test_silence_is_filled_with_comments_also_before_the_first_token(
    make_app: Callable[..., FastAPI], engine: FakeEngine
) -> None:
    engine.gate = asyncio.Event()
    reader = Reader({"prompt": "Hi", "stream": True})
    reader.may_read.set()
    app = make_app(ping_interval=0.02)
    task = asyncio.create_task(app(scope_of(COMPLETIONS), reader.receive, reader.send))
    await until(lambda: reader.text.count(": ping") >= 2)
    engine.gate.set()
    await task
    assert reader.text.startswith(": ping\n\n: ping\n\n")
    assert join_completion(chunks_of(reader.text))[0]["text"] == "Hello, world"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["Hi", ["a", "b"]])
async def test_a_hangup_frees_everything(
    make_app: Callable[..., FastAPI], engine: FakeEngine, stream: bool, prompt: Any
) -> None:
    engine.gate = asyncio.Event()
    reader = Reader({"prompt": prompt, "stream": stream})
    reader.may_read.set()
    task = asyncio.create_task(make_app()(scope_of(COMPLETIONS), reader.receive, reader.send))
    await until(lambda: engine.live > 0)
    reader.gone.set()
    await until(lambda: engine.live == 0)
    await task


async def test_a_hangup_mid_stream_frees_everything(
    make_app: Callable[..., FastAPI], engine: FakeEngine
) -> None:
    engine.pause = 0.01
    engine.script = lambda prompt, one: [65]
    reader = Reader({"prompt": "Hi", "stream": True, "max_tokens": 190})
    reader.may_read.set()
    task = asyncio.create_task(make_app()(scope_of(COMPLETIONS), reader.receive, reader.send))
    await until(lambda: len(reader.messages) > 3)
    reader.gone.set()
    await task
    assert engine.live == 0
    assert "[DONE]" not in reader.text


async def test_a_hangup_while_nothing_can_be_written_frees_everything(
    make_app: Callable[..., FastAPI], engine: FakeEngine
) -> None:
    reader = Reader({"prompt": "Hi", "stream": True})
    task = asyncio.create_task(make_app()(scope_of(COMPLETIONS), reader.receive, reader.send))
    await until(lambda: engine.live > 0)
    reader.gone.set()
    await task
    assert engine.live == 0


async def test_an_unforeseen_failure_is_logged_and_told_without_a_trace(
    client: httpx.AsyncClient, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(prompt: list[int], one: object) -> list[int]:
        raise RuntimeError("secret /path/of/a/file")

    engine.script = broken
    response = await client.post(COMPLETIONS, json={"prompt": "Hi"})
    assert response.status_code == 500
    assert "secret" not in response.text
    assert response.json()["error"]["type"] == "server_error"
    assert "secret" in caplog.text
    told = [record.__dict__.get("request_id") for record in caplog.records]
    assert told == [response.headers["x-request-id"]]


async def test_an_end_token_in_a_stream_closes_it(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.script = lambda prompt, one: [EOS]
    response = await client.post(COMPLETIONS, json={"prompt": "Hi", "stream": True})
    assert join_completion(chunks_of(response.text))[0] | {"ids": 0} == {
        "text": "",
        "ids": 0,
        "logprobs": [],
        "finish_reason": "stop",
        "stop_reason": None,
    }
