"""``/v1/responses``: items in and out, named events in order, nothing stored, none in silence."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from service.api import response_input
from service.api.app import create_app
from service.api.conversation import Chat, prepare
from service.api.response_input import as_chat
from service.api.schemas.responses import ResponseRequest
from service.errors import Overloaded
from service.registry import ModelRegistry
from service.settings import Settings
from tests.api.conftest import Reader, scope_of, talking_to, until
from tests.api.fakes import FakeEngine, say, served
from tests.api.toy_reader import ToyReader

URL = "/v1/responses"
EVENT = TypeAdapter(ResponseStreamEvent)


def events_of(body: str) -> list[dict[str, Any]]:
    """Every event; asserts the framing, the numbers, and that OpenAI's package takes each."""
    events = []
    for frame in body.split("\n\n"):
        if not frame or frame.startswith(":"):
            continue
        name, data = frame.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
        EVENT.validate_python(events[-1])
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def types_of(events: list[dict[str, Any]]) -> list[str]:
    """Without repetitions in a row."""
    types = [event["type"].removeprefix("response.") for event in events]
    return [kind for index, kind in enumerate(types) if not index or types[index - 1] != kind]


async def ask(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    response = await client.post(URL, json={"input": "Hi"} | fields)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    Response.model_validate(answer)
    return answer


async def stream(client: httpx.AsyncClient, **fields: Any) -> list[dict[str, Any]]:
    response = await client.post(URL, json={"input": "Hi", "stream": True} | fields)
    assert response.status_code == 200, response.text
    return events_of(response.text)


async def refuse(client: httpx.AsyncClient, status: int = 400, **fields: Any) -> dict[str, Any]:
    response = await client.post(URL, json={"input": "Hi"} | fields)
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def prompt_of(engine: FakeEngine, number: int = -1) -> str:
    ids = engine.submitted[number]["prompt"]
    assert isinstance(ids, list)
    return bytes(token for token in ids if token < 256).decode()


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers are read as if the model spoke the toy dialect."""
    monkeypatch.setattr(response_input, "prepare", read_toys)


async def read_toys(*arguments: Any) -> Chat:
    return replace(await prepare(*arguments), reader=ToyReader)


# ---- answers


async def test_an_answer_is_one_message_with_exact_usage(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.cached = 3
    answer = await ask(client, metadata={"a": "b"}, instructions="Be kind.", user="me")
    assert (answer["status"], answer["error"], answer["incomplete_details"]) == (
        "completed",
        None,
        None,
    )
    [message] = answer["output"]
    assert (message["type"], message["role"], message["status"]) == (
        "message",
        "assistant",
        "completed",
    )
    assert message["content"] == [
        {"type": "output_text", "text": "Hello, world", "annotations": [], "logprobs": []}
    ]
    prompt = engine.submitted[0]["prompt"]
    assert isinstance(prompt, list)
    assert answer["usage"] == {
        "input_tokens": len(prompt),
        "input_tokens_details": {"cached_tokens": 3, "cache_write_tokens": 0},
        "output_tokens": 13,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": len(prompt) + 13,
    }
    assert (answer["metadata"], answer["instructions"], answer["user"]) == (
        {"a": "b"},
        "Be kind.",
        "me",
    )
    assert answer["store"] is False
    assert answer["completed_at"] >= answer["created_at"]


async def test_a_budget_that_ends_is_incomplete(client: httpx.AsyncClient) -> None:
    answer = await ask(client, max_output_tokens=3)
    assert answer["status"] == "incomplete"
    assert answer["incomplete_details"] == {"reason": "max_output_tokens"}
    assert answer["output"][0]["status"] == "incomplete"
    assert answer["completed_at"] is None
    events = await stream(client, max_output_tokens=3)
    assert events[-1]["type"] == "response.incomplete"


async def test_a_stream_has_its_events_in_order(client: httpx.AsyncClient) -> None:
    events = await stream(client)
    assert types_of(events) == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert events[0]["response"]["status"] == "in_progress"
    assert events[0]["response"]["usage"] is None
    assert events[-1]["response"]["usage"]["output_tokens"] == 13
    assert len([event for event in events if event["type"].endswith("text.delta")]) == 12


@pytest.mark.usefixtures("toy")
async def test_reasoning_and_calls_are_items_of_their_own(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.script = lambda prompt, one: say('(hm)ok[f:{"a":1}][g:{}]')
    events = await stream(client)
    item = ["output_item.added", "content_part.added"]
    done = ["content_part.done", "output_item.done"]
    call = ["function_call_arguments.delta", "function_call_arguments.done", "output_item.done"]
    assert types_of(events) == [
        *("created", "in_progress", *item, "reasoning_text.delta", "reasoning_text.done", *done),
        *(*item, "output_text.delta", "output_text.done", *done),
        *("output_item.added", *call, "output_item.added", *call, "completed"),
    ]
    reasoning, message, first, second = events[-1]["response"]["output"]
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "hm"}]
    assert message["content"][0]["text"] == "ok"
    assert (first["name"], first["arguments"], first["call_id"]) == ("f", '{"a":1}', "call_0")
    assert (second["name"], second["arguments"], second["call_id"]) == ("g", "{}", "call_1")
    Response.model_validate(events[-1]["response"])


async def test_logprobs_are_told_on_demand(client: httpx.AsyncClient) -> None:
    include = ["message.output_text.logprobs"]
    answer = await ask(client, include=include, top_logprobs=1, max_output_tokens=2)
    logprobs = answer["output"][0]["content"][0]["logprobs"]
    assert [one["token"] for one in logprobs] == ["H", "e"]
    assert [len(one["top_logprobs"]) for one in logprobs] == [1, 1]
    events = await stream(client, include=include, max_output_tokens=2)
    told = [one for event in events if "delta" in event for one in event["logprobs"]]
    assert [one["token"] for one in told] == ["H", "e"]
    assert told[0]["top_logprobs"] == []


FIELDS = st.fixed_dictionaries(
    {
        "max_output_tokens": st.integers(1, 40),
        "include": st.sampled_from([[], ["message.output_text.logprobs"]]),
        "top_logprobs": st.integers(0, 2),
    }
)


def stripped(value: Any) -> Any:
    """Without what differs from one answer to the next: ids and times."""
    if isinstance(value, dict):
        left = {k: v for k, v in value.items() if k not in ("id", "created_at", "completed_at")}
        return {key: stripped(inner) for key, inner in left.items()}
    return [stripped(inner) for inner in value] if isinstance(value, list) else value


def join(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The items as a client adds them up from the deltas, without logprobs."""
    items: dict[int, dict[str, Any]] = {}
    for event in events:
        index = event.get("output_index", -1)
        match event["type"].removeprefix("response."):
            case "output_item.added":
                assert index == len(items)
                items[index] = {"type": event["item"]["type"], "text": ""}
            case "output_text.delta" | "reasoning_text.delta" | "function_call_arguments.delta":
                items[index]["text"] += event["delta"]
            case "output_text.done" | "reasoning_text.done":
                assert items[index]["text"] == event["text"]
            case "function_call_arguments.done":
                assert items[index]["text"] == event["arguments"]
            case "output_item.done":
                items[index]["status"] = event["item"]["status"]
    return list(items.values())


def joined(output: list[dict[str, Any]]) -> list[dict[str, Any]]:
    texts = [
        item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"]
        for item in output
    ]
    return [
        {"type": item["type"], "text": text, "status": item["status"]}
        for item, text in zip(output, texts, strict=True)
    ]


@settings(max_examples=80, deadline=None)
@given(text=st.text("ab([])f:é", max_size=30), fields=FIELDS, group=st.integers(1, 5))
async def test_a_stream_joined_is_the_whole_answer(
    text: str, fields: dict[str, Any], group: int
) -> None:
    engine = FakeEngine(script=lambda prompt, one: say(text), group=group)
    app = create_app(Settings(), ModelRegistry([served(engine)]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(response_input, "prepare", read_toys)
        async with talking_to(app) as client:
            whole = await ask(client, **fields)
            engine.group = 1
            events = await stream(client, **fields)
    assert stripped(events[-1]["response"]) == stripped(whole)
    assert join(events) == joined(whole["output"])
    assert engine.live == 0


# ---- what is asked


async def test_items_become_messages(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    await ask(
        client,
        instructions="One.",
        input=[
            {"role": "developer", "content": "Two."},
            {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
            {
                "type": "message",
                "role": "assistant",
                "id": "msg_1",
                "status": "completed",
                "content": [{"type": "output_text", "text": "b", "annotations": []}],
            },
            {"role": "user", "content": "c"},
        ],
    )
    assert prompt_of(engine) == "system: One.\n\nTwo.\nuser: a\nassistant: b\nuser: c\n"


def test_reasoning_text_and_calls_in_a_row_are_one_turn() -> None:
    request = ResponseRequest.model_validate(
        {
            "input": [
                {"role": "user", "content": "x"},
                {
                    "type": "reasoning",
                    "id": "rs_1",
                    "summary": [],
                    "content": [{"type": "reasoning_text", "text": "hm"}],
                },
                {"type": "message", "role": "assistant", "content": "let me see"},
                {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
                {"type": "function_call", "call_id": "2", "name": "g", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "2", "output": "two"},
                {
                    "type": "function_call_output",
                    "call_id": "1",
                    "output": [{"type": "input_text", "text": "one"}],
                },
                {"type": "function_call", "call_id": "3", "name": "f", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "3", "output": "three"},
                {"type": "reasoning", "summary": [{"type": "summary_text", "text": "so"}]},
            ]
        }
    )
    messages = as_chat(request).messages
    assert [message.role for message in messages] == [
        *("user", "assistant", "tool", "tool", "assistant", "tool", "assistant"),
    ]
    turn = messages[1]
    assert (turn.content, turn.reasoning_content) == ("let me see", "hm")
    assert [call.id for call in turn.tool_calls or ()] == ["1", "2"]
    assert [(m.tool_call_id, m.name, m.content) for m in messages if m.role == "tool"] == [
        ("2", "g", "two"),
        ("1", "f", "one"),
        ("3", "f", "three"),
    ]
    assert messages[4].content is None
    assert (messages[6].content, messages[6].reasoning_content) == ("", "so")


async def test_an_answer_sent_back_as_history_is_taken_unchanged(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    output = (await ask(client))["output"]
    history = [{"role": "user", "content": "Hi"}, *output, {"role": "user", "content": "And?"}]
    response = await client.post(URL, json={"input": history})
    assert response.status_code == 200, response.text
    assert "x-ignored-params" not in response.headers
    assert "assistant: Hello, world\n" in prompt_of(engine)


TOOL = {"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": True}


def test_tools_formats_and_effort_are_told_in_chat_s_words() -> None:
    request = ResponseRequest.model_validate(
        {
            "input": "x",
            "tools": [TOOL],
            "tool_choice": {"type": "function", "name": "f"},
            "parallel_tool_calls": False,
            "text": {
                "format": {"type": "json_schema", "name": "n", "schema": {"a": 1}, "strict": True}
            },
            "reasoning": {"effort": "low"},
            "max_output_tokens": 5,
        }
    )
    values = as_chat(request).model_dump(exclude_none=True, by_alias=True)
    function = {"name": "f", "parameters": {"type": "object"}, "strict": True}
    assert values["tools"] == [{"type": "function", "function": function}]
    assert values["tool_choice"] == {"type": "function", "function": {"name": "f"}}
    assert values["parallel_tool_calls"] is False
    schema = {"name": "n", "schema": {"a": 1}, "strict": True}
    assert values["response_format"] == {"type": "json_schema", "json_schema": schema}
    assert values["reasoning_effort"] == "low"
    assert values["max_completion_tokens"] == 5


def message_parts(kind: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": kind, "text": "x"}]}]


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"input": []}, "input", "at least 1"),
        ({"input": None}, "input", ""),
        ({"input": [{"type": "web_search_call"}]}, "input[0]", "item of type"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]", "stored"),
        ({"input": message_parts("input_image")}, "input[0].content[0]", "text alone"),
        ({"input": [{"role": "user", "content": 5}]}, "input[0].content", ""),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role", ""),
        (
            {"input": [{"type": "function_call_output", "call_id": "x", "output": "y"}]},
            "input[0].call_id",
            "no function_call",
        ),
        ({"tools": [{"type": "web_search"}]}, "tools[0]", "runs no tools itself"),
        ({"tool_choice": {"type": "file_search"}}, "tool_choice.", ""),
        ({"max_output_tokens": 0}, "max_output_tokens", ""),
        ({"max_output_tokens": 1000}, "max_output_tokens", "max_output_tokens may be at most"),
        ({"input": "x" * 400}, "input", "truncation"),
        ({"temperature": 3}, "temperature", ""),
        ({"top_logprobs": 21}, "top_logprobs", ""),
        ({"metadata": {"a": 5}}, "metadata.a", ""),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema", "required"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "stores no"),
        ({"conversation": "conv_1"}, "conversation", "stores no"),
        ({"background": True}, "background", "while the client waits"),
        ({"prompt": {"id": "x"}}, "prompt", "stores no"),
        ({"unknown": 1, "strict": True}, "unknown", "ignore"),
    ],
)
async def test_what_is_wrong_is_refused_by_its_path(
    client: httpx.AsyncClient, fields: dict[str, Any], param: str, words: str
) -> None:
    error = await refuse(client, **fields)
    assert error["param"].startswith(param)
    assert words in error["message"]


async def test_an_unknown_model_is_404(client: httpx.AsyncClient) -> None:
    assert (await refuse(client, 404, model="gpt"))["code"] == "model_not_found"


async def test_nothing_is_ignored_in_silence(client: httpx.AsyncClient) -> None:
    body = {
        "input": "Hi",
        "store": True,
        "include": ["reasoning.encrypted_content", "message.output_text.logprobs"],
        "text": {"verbosity": "low"},
        "reasoning": {"summary": "auto"},
        "stream_options": {"include_obfuscation": True},
        "moderation": {"model": "m"},
    }
    response = await client.post(URL, json=body)
    assert response.status_code == 200
    assert set(response.headers["x-ignored-params"].split(", ")) == {
        "store",
        "include.reasoning.encrypted_content",
        "text.verbosity",
        "reasoning.summary",
        "stream_options.include_obfuscation",
        "moderation",
    }
    quiet = {"input": "Hi", "store": False, "background": False, "service_tier": "auto"}
    assert "x-ignored-params" not in (await client.post(URL, json=quiet)).headers


async def test_nothing_is_stored(client: httpx.AsyncClient) -> None:
    answer = await ask(client, store=True)
    for method in ("GET", "DELETE"):
        response = await client.request(method, f"{URL}/{answer['id']}")
        assert response.status_code == 404
        assert "stores no responses" in response.json()["error"]["message"]


async def test_truncation_leaves_out_the_oldest_turns(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    turns: list[dict[str, Any]] = [{"role": "system", "content": "sys"}]
    for number in range(20):
        turns.append({"role": "user", "content": f"q{number:02}" + "x" * 10})
        turns.append({"role": "assistant", "content": f"a{number:02}"})
    turns.append({"role": "user", "content": "last"})
    assert (await refuse(client, input=turns))["code"] == "context_length_exceeded"
    await ask(client, input=turns, truncation="auto", max_output_tokens=50)
    prompt = prompt_of(engine)
    assert prompt.startswith("system: sys\nuser: q")
    assert prompt.endswith("assistant: a19\nuser: last\n")
    ids = engine.submitted[-1]["prompt"]
    assert isinstance(ids, list)
    turn = len("user: q00xxxxxxxxxx\nassistant: a00\n") + 2
    assert 150 - turn < len(ids) <= 150, "as many turns as fit, and no more"
    error = await refuse(client, input="x" * 400, truncation="auto")
    assert error["code"] == "context_length_exceeded"


async def test_input_tokens_are_counted_also_where_they_do_not_fit(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    response = await client.post(f"{URL}/input_tokens", json={"input": "x" * 300})
    assert response.json() == {"object": "response.input_tokens", "input_tokens": 310}
    await ask(client, input="abc")
    response = await client.post(f"{URL}/input_tokens", json={"input": "abc"})
    prompt = engine.submitted[0]["prompt"]
    assert isinstance(prompt, list)
    assert response.json()["input_tokens"] == len(prompt)


# ---- failures, silence, hang-ups, books


@pytest.mark.parametrize("outputs", [1, 4])
async def test_a_failure_mid_stream_ends_in_error_and_failed(
    client: httpx.AsyncClient, engine: FakeEngine, outputs: int
) -> None:
    engine.fail_after = outputs
    events = await stream(client)
    *_, error, failed = events
    assert (error["type"], error["code"]) == ("error", "engine_failure")
    assert failed["type"] == "response.failed"
    assert failed["response"]["status"] == "failed"
    assert failed["response"]["error"]["code"] == "server_error"
    [message] = failed["response"]["output"]
    assert message["content"][0]["text"] == "Hello"[:outputs]
    assert engine.live == 0


async def test_a_failure_after_a_ping_still_opens_the_response(
    make_app: Callable[..., FastAPI], engine: FakeEngine
) -> None:
    engine.gate, engine.fail_after = asyncio.Event(), 0
    reader = Reader({"input": "Hi", "stream": True})
    reader.may_read.set()
    app = make_app(ping_interval=0.02)
    task = asyncio.create_task(app(scope_of(URL), reader.receive, reader.send))
    await until(lambda: ": ping" in reader.text)
    engine.gate.set()
    await task
    assert types_of(events_of(reader.text)) == ["created", "in_progress", "error", "failed"]


@pytest.mark.parametrize("streams", [False, True])
async def test_a_failure_before_the_first_byte_has_a_status(
    client: httpx.AsyncClient, engine: FakeEngine, streams: bool
) -> None:
    engine.fail_after = 0
    assert (await refuse(client, 500, stream=streams))["code"] == "engine_failure"
    engine.refusal = Overloaded("full", retry_after=2)
    assert (await refuse(client, 429, stream=streams))["code"] == "queue_full"


@pytest.mark.parametrize("streams", [False, True])
async def test_a_hangup_frees_everything(
    make_app: Callable[..., FastAPI], engine: FakeEngine, streams: bool
) -> None:
    engine.gate = asyncio.Event()
    reader = Reader({"input": "Hi", "stream": streams})
    reader.may_read.set()
    task = asyncio.create_task(make_app()(scope_of(URL), reader.receive, reader.send))
    await until(lambda: engine.live > 0)
    reader.gone.set()
    await task
    assert engine.live == 0


async def test_it_is_in_the_books(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    await ask(client)
    engine.refusal = Overloaded("full", retry_after=2)
    await refuse(client, 429)
    metrics = (await client.get("/metrics")).text
    assert "pronk:requests_received_total 2.0" in metrics
    assert "pronk:requests_finished_total 1.0" in metrics
    assert "pronk:requests_rejected_total 1.0" in metrics
    assert 'reason="queue_full"} 1.0' in metrics


async def test_a_tool_in_chats_shape_is_told_where_its_name_belongs(
    client: httpx.AsyncClient,
) -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    response = await client.post("/v1/responses", json={"input": "x", "tools": [tool]})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "tools[0].name")
