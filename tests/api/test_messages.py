"""``/v1/messages``: Anthropic's blocks in and out, its events, its errors, on every way to fail."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import httpx
import pytest
from anthropic.types import Message, RawMessageStreamEvent
from fastapi import FastAPI
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from service.api import message_input
from service.api.app import create_app
from service.api.conversation import Chat, prepare
from service.api.messages import read_input
from service.api.schemas.messages import MessagesRequest
from service.api.translation import to_chat
from service.engine.messages import State
from service.errors import Overloaded
from service.registry import ModelRegistry
from service.settings import Settings
from tests.api.conftest import Reader, scope_of, talking_to, until
from tests.api.fakes import FakeEngine, say, served
from tests.api.toy_reader import ToyReader

URL = "/v1/messages"
HELLO = [{"role": "user", "content": "Hi"}]
EVENT = TypeAdapter(RawMessageStreamEvent)
OTHERS = ("ping", "error")  # that Anthropic's package reads by other means


def events_of(body: str) -> list[dict[str, Any]]:
    """Every event; asserts the framing, and that Anthropic's package takes each."""
    events = []
    for frame in filter(None, body.split("\n\n")):
        name, data = frame.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
        if events[-1]["type"] not in OTHERS:
            EVENT.validate_python(events[-1])
    return events


async def ask(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    body = {"messages": HELLO, "max_tokens": 50} | fields
    response = await client.post(URL, json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    Message.model_validate(answer)
    return answer


async def stream(client: httpx.AsyncClient, **fields: Any) -> list[dict[str, Any]]:
    body = {"messages": HELLO, "max_tokens": 50, "stream": True} | fields
    response = await client.post(URL, json=body)
    assert response.status_code == 200, response.text
    return events_of(response.text)


def error_of(response: httpx.Response) -> dict[str, Any]:
    body = response.json()
    assert set(body) == {"type", "error", "request_id"}
    assert body["type"] == "error"
    assert set(body["error"]) == {"type", "message"}
    assert body["request_id"] == response.headers["request-id"] == response.headers["x-request-id"]
    error: dict[str, Any] = body["error"]
    return error


async def refuse(client: httpx.AsyncClient, status: int = 400, **fields: Any) -> dict[str, Any]:
    response = await client.post(URL, json={"messages": HELLO, "max_tokens": 50} | fields)
    assert response.status_code == status, response.text
    return error_of(response)


def prompt_of(engine: FakeEngine, number: int = -1) -> str:
    ids = engine.submitted[number]["prompt"]
    assert isinstance(ids, list)
    return bytes(token for token in ids if token < 256).decode()


async def read_toys(*arguments: Any) -> Chat:
    return replace(await prepare(*arguments), reader=ToyReader)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers are read as if the model spoke the toy dialect."""
    monkeypatch.setattr(message_input, "prepare", read_toys)


# ---- answers


async def test_an_answer_has_every_key(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.cached = 5
    answer = await ask(client)
    prompt = engine.submitted[0]["prompt"]
    assert isinstance(prompt, list)
    assert answer.pop("id").startswith("msg_")
    assert answer == {
        "type": "message",
        "role": "assistant",
        "model": "tiny",
        "content": [{"type": "text", "text": "Hello, world"}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": len(prompt) - 5,
            "cache_read_input_tokens": 5,
            "cache_creation_input_tokens": 0,
            "output_tokens": 13,
            "output_tokens_details": {"thinking_tokens": 0},
        },
    }


@pytest.mark.parametrize(
    ("fields", "reason", "sequence"),
    [
        ({}, "end_turn", None),
        ({"max_tokens": 3}, "max_tokens", None),
        ({"stop_sequences": ["wor", "z"]}, "stop_sequence", "wor"),
    ],
)
async def test_why_it_stopped_is_told_whole_and_streamed(
    client: httpx.AsyncClient, fields: dict[str, Any], reason: str, sequence: str | None
) -> None:
    answer = await ask(client, **fields)
    assert (answer["stop_reason"], answer["stop_sequence"]) == (reason, sequence)
    last = (await stream(client, **fields))[-2]
    assert last["delta"] == {"stop_reason": reason, "stop_sequence": sequence}
    assert last["usage"] == answer["usage"]


@pytest.mark.usefixtures("toy")
async def test_thinking_text_and_calls_are_blocks(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.script = lambda prompt, one: say('(hm)ok[f:{"a":1}][g:{}]')
    answer = await ask(client)
    assert answer["content"] == [
        {"type": "thinking", "thinking": "hm", "signature": ""},
        {"type": "text", "text": "ok"},
        {"type": "tool_use", "id": "call_0", "name": "f", "input": {"a": 1}},
        {"type": "tool_use", "id": "call_1", "name": "g", "input": {}},
    ]
    assert answer["stop_reason"] == "tool_use"
    events = await stream(client)
    types = [event["type"] for event in events]
    order = [kind for index, kind in enumerate(types) if not index or types[index - 1] != kind]
    block = ["content_block_start", "content_block_delta", "content_block_stop"]
    assert order == ["message_start", *block * 4, "message_delta", "message_stop"]
    starts = [event["content_block"] for event in events if "content_block" in event]
    assert starts[2] == {"type": "tool_use", "id": "call_0", "name": "f", "input": {}}
    assert events[0]["message"]["content"] == []
    assert events[0]["message"]["usage"]["input_tokens"] == answer["usage"]["input_tokens"]


def join(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The blocks, as Anthropic's package adds them up."""
    blocks: list[dict[str, Any]] = []
    arguments = ""
    for event in events:
        match event["type"]:
            case "content_block_start":
                assert event["index"] == len(blocks)
                blocks.append(event["content_block"])
                arguments = ""
            case "content_block_delta":
                delta = event["delta"]
                if delta["type"] == "input_json_delta":
                    arguments += delta["partial_json"]
                    blocks[-1]["input"] = read_input(arguments)
                else:
                    name = delta["type"].removesuffix("_delta")
                    blocks[-1][name] += delta[name]
    return blocks


@settings(max_examples=80, deadline=None)
@given(
    text=st.text('ab([])f:é{"}1', max_size=30),
    budget=st.integers(1, 40),
    stops=st.lists(st.sampled_from(["ab", "é", "f"]), max_size=2),
    group=st.integers(1, 5),
)
async def test_a_stream_joined_is_the_whole_answer(
    text: str, budget: int, stops: list[str], group: int
) -> None:
    engine = FakeEngine(script=lambda prompt, one: say(text), group=group)
    app = create_app(Settings(), ModelRegistry([served(engine)]))
    fields = {"max_tokens": budget, "stop_sequences": stops}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(message_input, "prepare", read_toys)
        async with talking_to(app) as client:
            whole = await ask(client, **fields)
            engine.group = 1
            events = await stream(client, **fields)
    assert join(events) == whole["content"]
    assert events[-2]["usage"] == whole["usage"]
    assert events[-2]["delta"]["stop_reason"] == whole["stop_reason"]
    assert engine.live == 0


@pytest.mark.parametrize(
    ("arguments", "read"),
    [("", {}), ('{"a": 1}', {"a": 1}), ('{"a": 1, "b": [2, "c', {"a": 1, "b": [2]}), ("[1", {})],
)
def test_of_a_call_that_was_cut_what_can_be_read_is(arguments: str, read: dict[str, Any]) -> None:
    assert read_input(arguments) == read


# ---- what is asked


async def test_blocks_become_messages(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    await ask(
        client,
        system=[
            {"type": "text", "text": "One.", "cache_control": {"type": "ephemeral"}},
            {"type": "text", "text": "Two."},
        ],
        messages=[
            {"role": "user", "content": [{"type": "text", "text": "a"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "b", "citations": None}]},
            {"role": "user", "content": "c"},
        ],
    )
    assert prompt_of(engine) == "system: One.\nTwo.\nuser: a\nassistant: b\nuser: c\n"


async def test_the_assistant_s_last_words_are_gone_on_with(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    await ask(client, messages=[*HELLO, {"role": "assistant", "content": "I am"}])
    assert prompt_of(engine).endswith("assistant: I am")


def as_chat(**fields: Any) -> dict[str, Any]:
    request = MessagesRequest.model_validate({"messages": HELLO, "max_tokens": 5} | fields)
    values = message_input._conversation(request) | message_input._generation(request)
    return to_chat(request, values).model_dump(exclude_none=True, by_alias=True)


def test_calls_and_results_are_told_in_chat_s_words() -> None:
    messages = as_chat(
        messages=[
            {"role": "user", "content": "x"},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hm", "signature": "s"},
                    {"type": "redacted_thinking", "data": "zzz"},
                    {"type": "text", "text": "see"},
                    {"type": "tool_use", "id": "1", "name": "f", "input": {"a": "é"}},
                    {"type": "tool_use", "id": "2", "name": "g", "input": {}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "1", "content": "one"},
                    {
                        "type": "tool_result",
                        "tool_use_id": "2",
                        "content": [{"type": "text", "text": "two"}],
                        "is_error": True,
                    },
                    {"type": "text", "text": "go on"},
                ],
            },
        ]
    )["messages"]
    calls = messages[1].pop("tool_calls")
    assert messages == [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "see", "reasoning_content": "hm"},
        {"role": "tool", "tool_call_id": "1", "name": "f", "content": "one"},
        {"role": "tool", "tool_call_id": "2", "name": "g", "content": "Error: two"},
        {"role": "user", "content": "go on"},
    ]
    assert [(call["id"], call["function"]["name"]) for call in calls] == [("1", "f"), ("2", "g")]
    assert calls[0]["function"]["arguments"] == '{"a":"é"}'


SCHEMA = {"type": "object", "properties": {}}
TOOLS = [{"name": "f", "description": "d", "input_schema": SCHEMA}]


@pytest.mark.parametrize(
    ("choice", "told"),
    [
        ({"type": "auto"}, "auto"),
        ({"type": "any"}, "required"),
        ({"type": "none"}, "none"),
        ({"type": "tool", "name": "f"}, {"type": "function", "function": {"name": "f"}}),
    ],
)
def test_tools_are_told_in_chat_s_words(choice: dict[str, Any], told: Any) -> None:
    values = as_chat(tools=TOOLS, tool_choice=choice | {"disable_parallel_tool_use": True})
    function = {"name": "f", "description": "d", "parameters": SCHEMA}
    assert values["tools"] == [{"type": "function", "function": function}]
    assert values["tool_choice"] == told
    assert values["parallel_tool_calls"] is False


def test_thinking_effort_and_formats_are_told_in_chat_s_words() -> None:
    values = as_chat(
        thinking={"type": "enabled"},
        output_config={"effort": "max", "format": {"type": "json_schema", "schema": SCHEMA}},
        top_k=3,
        stop_sequences=["z"],
        metadata={"user_id": "me"},
    )
    assert values["chat_template_kwargs"] == {"enable_thinking": True}
    assert values["reasoning_effort"] == "xhigh"
    assert values["response_format"]["json_schema"]["schema"] == SCHEMA
    assert (values["top_k"], values["stop"], values["user"]) == (3, ["z"], "me")


def said(*blocks: dict[str, Any], role: str = "user") -> list[dict[str, Any]]:
    return [{"role": role, "content": list(blocks)}]


RESULT = {"type": "tool_result", "tool_use_id": "x"}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_tokens": None}, "max_tokens: "),
        ({"max_tokens": 0}, "max_tokens: "),
        ({"max_tokens": 1000}, "max_tokens may be at most"),
        ({"messages": []}, "messages: "),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role: "),
        ({"messages": said({"type": "image", "source": {}})}, "reads text alone"),
        ({"messages": said({"type": "document"})}, "reads text alone"),
        ({"messages": said(RESULT)}, "messages[0].content[0].tool_use_id: no tool_use"),
        ({"messages": said(RESULT, role="assistant")}, "messages[0].content[0]: a tool_result"),
        (
            {"messages": said({"type": "tool_use", "id": "1", "name": "f", "input": {}})},
            "messages[0].content[0]: a tool_use is nothing a user says",
        ),
        ({"messages": said({"type": "text", "text": 5})}, "messages[0].content[0].text: "),
        ({"messages": [{"role": "user", "content": "x" * 400}]}, "at most 199 tokens."),
        ({"temperature": 1.5}, "temperature: "),
        ({"top_p": 0}, "top_p: "),
        ({"stop_sequences": [""]}, "stop_sequences[0]: "),
        ({"stop_sequences": ["a"] * 9}, "stop_sequences: takes at most 4"),
        ({"tools": [{"type": "web_search_20250305", "name": "w"}]}, "no tools of its own"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema: is required"),
        ({"tools": TOOLS, "tool_choice": {"type": "tool"}}, "tool_choice.name: is required"),
        ({"thinking": {"type": "loud"}}, "thinking.type: "),
        ({"unknown": 1, "strict": True}, "would ignore: unknown"),
    ],
)
async def test_what_is_wrong_is_refused_by_its_path(
    client: httpx.AsyncClient, fields: dict[str, Any], words: str
) -> None:
    error = await refuse(client, **fields)
    assert error["type"] == "invalid_request_error"
    assert words in error["message"]


async def test_nothing_is_ignored_in_silence(client: httpx.AsyncClient) -> None:
    body = {
        "messages": HELLO,
        "max_tokens": 9,
        "thinking": {"type": "enabled", "budget_tokens": 1024},
        "mcp_servers": [],
        "cache_control": {"type": "ephemeral"},
        "service_tier": "auto",
    }
    response = await client.post(URL, json=body)
    assert response.headers["x-ignored-params"] == "mcp_servers, thinking.budget_tokens"


async def test_tokens_are_counted_also_where_they_do_not_fit(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    await ask(client, system="s")
    prompt = engine.submitted[0]["prompt"]
    assert isinstance(prompt, list)
    url = f"{URL}/count_tokens"
    response = await client.post(url, json={"messages": HELLO, "system": "s"})
    assert response.json() == {"input_tokens": len(prompt)}
    long = [{"role": "user", "content": "x" * 300}]
    assert (await client.post(url, json={"messages": long})).json() == {"input_tokens": 310}
    assert "messages" in error_of(await client.post(url, json={}))["message"]


# ---- failures of every kind


async def test_every_refusal_is_anthropic_s(
    make_app: Callable[..., FastAPI], engine: FakeEngine
) -> None:
    body = {"messages": HELLO, "max_tokens": 9}
    app = make_app(api_key=["key"], max_body_bytes=1024)
    async with talking_to(app) as client:

        async def told(method: str, path: str, **rest: Any) -> tuple[int, str]:
            headers = {"x-api-key": "key"} | rest.pop("headers", {})
            response = await client.request(method, path, headers=headers, **rest)
            return response.status_code, error_of(response)["type"]

        wrong = {"x-api-key": "no"}
        text = {"content-type": "text/plain"}
        invalid = "invalid_request_error"
        assert await told("POST", URL, json=body, headers=wrong) == (401, "authentication_error")
        assert await told("POST", f"{URL}/nothing", json=body) == (404, "not_found_error")
        assert await told("POST", URL, json=body | {"model": "x"}) == (404, "not_found_error")
        assert await told("GET", URL) == (405, invalid)
        assert await told("POST", URL, content=b"{" * 30) == (415, invalid)
        json_type = {"content-type": "application/json"}
        large = await told("POST", URL, content=b" " * 2000, headers=json_type)
        assert large == (413, "request_too_large")
        assert await told("POST", URL, content=b"{", headers=text) == (415, invalid)
        assert await told("POST", URL, content=b"{", headers=json_type) == (400, invalid)
        engine.fail_after = 0
        assert await told("POST", URL, json=body) == (500, "api_error")
        engine.refusal = Overloaded("full", retry_after=2)
        assert await told("POST", URL, json=body) == (529, "overloaded_error")
        engine.state = State(stage="loading")
        assert await told("POST", URL, json=body) == (503, "overloaded_error")
        metrics = (await client.get("/metrics", headers={"x-api-key": "key"})).text
    assert "pronk:requests_failed_total 1.0" in metrics, "the engine's own"
    assert 'reason="queue_full"} 1.0' in metrics


async def test_a_full_queue_says_when_to_come_back(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.refusal = Overloaded("full", retry_after=1.5)
    response = await client.post(URL, json={"messages": HELLO, "max_tokens": 9})
    assert response.headers["retry-after"] == "2"


async def test_an_unforeseen_failure_is_anthropic_s_too(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    def broken(prompt: list[int], one: object) -> list[int]:
        raise RuntimeError("secret")

    engine.script = broken
    error = await refuse(client, 500)
    assert error["type"] == "api_error"
    assert "secret" not in error["message"]


async def test_a_failure_mid_stream_is_the_last_event(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.fail_after = 3
    *before, last = await stream(client)
    assert last["error"]["type"] == "api_error"
    assert last["request_id"]
    assert "message_stop" not in [event["type"] for event in before]
    assert engine.live == 0


async def test_silence_is_filled_with_pings(
    make_app: Callable[..., FastAPI], engine: FakeEngine
) -> None:
    engine.gate = asyncio.Event()
    reader = Reader({"messages": HELLO, "max_tokens": 9, "stream": True})
    reader.may_read.set()
    app = make_app(ping_interval=0.02)
    task = asyncio.create_task(app(scope_of(URL), reader.receive, reader.send))
    await until(lambda: reader.text.count("event: ping") >= 2)
    engine.gate.set()
    await task
    events = events_of(reader.text)
    assert events[0] == {"type": "ping"}
    assert events[-1] == {"type": "message_stop"}
    assert join(events)[0]["text"] == "Hello, wo"


@pytest.mark.parametrize("streams", [False, True])
async def test_a_hangup_frees_everything(
    make_app: Callable[..., FastAPI], engine: FakeEngine, streams: bool
) -> None:
    engine.gate = asyncio.Event()
    reader = Reader({"messages": HELLO, "max_tokens": 9, "stream": streams})
    reader.may_read.set()
    task = asyncio.create_task(make_app()(scope_of(URL), reader.receive, reader.send))
    await until(lambda: engine.live > 0)
    reader.gone.set()
    await task
    assert engine.live == 0
