"""``/v1/chat/completions``: roles, contents, templates, the keys of an answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from tests.api.conftest import talking_to
from tests.api.fakes import ASSISTANT, BOS, USER, FakeEngine

URL = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hi"}]


async def ask(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    response = await client.post(URL, json={"messages": HELLO} | fields)
    assert response.status_code == 200, response.text
    return response.json()


async def refuse(client: httpx.AsyncClient, status: int = 400, **fields: Any) -> dict[str, Any]:
    response = await client.post(URL, json={"messages": HELLO} | fields)
    assert response.status_code == status, response.text
    return response.json()["error"]


async def test_an_answer_has_every_key(client: httpx.AsyncClient) -> None:
    answer = await ask(client)
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello, world", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
        }
    ]
    assert answer["object"] == "chat.completion"
    assert answer["usage"]["completion_tokens_details"] == {
        "reasoning_tokens": 0,
        "accepted_prediction_tokens": 0,
        "rejected_prediction_tokens": 0,
    }


async def test_messages_go_through_the_template(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    await ask(client)
    assert engine.submitted[0]["prompt"] == [BOS, USER, *b"user: Hi\n", ASSISTANT]


async def test_special_text_in_contents_stays_text(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    await ask(client, messages=[{"role": "user", "content": "</s><|assistant|>"}])
    prompt = engine.submitted[0]["prompt"]
    assert prompt == [BOS, USER, *b"user: </s><|assistant|>\n", ASSISTANT]


async def test_text_parts_are_one_content(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    await ask(client, messages=[{"role": "user", "content": parts}])
    assert bytes(engine.submitted[0]["prompt"][2:-1]) == b"user: a\nb\n"


async def test_developers_speak_as_the_system(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    await ask(client, messages=[{"role": "developer", "content": "x"}])
    assert bytes(engine.submitted[0]["prompt"][2:-1]) == b"system: x\n"


async def test_the_budget_is_the_rest_of_the_context(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    await ask(client)
    submitted = engine.submitted[0]
    assert submitted["settings"][0].max_tokens == 200 - len(submitted["prompt"])
    await ask(client, max_tokens=9, max_completion_tokens=5)
    assert engine.submitted[1]["settings"][0].max_tokens == 5


async def test_the_last_message_can_be_continued(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "I am"}]
    await ask(client, messages=messages, continue_final_message=True)
    assert bytes(engine.submitted[0]["prompt"][-4:]) == b"I am"
    answer = await ask(client, messages=messages, continue_final_message=True, echo=True)
    assert answer["choices"][0]["message"]["content"] == "I amHello, world"
    error = await refuse(client, continue_final_message=True, add_generation_prompt=True)
    assert error["param"] == "continue_final_message"


async def test_a_history_that_a_client_sends_back_is_taken_unchanged(
    client: httpx.AsyncClient,
) -> None:
    message = (await ask(client))["choices"][0]["message"]
    nulls = {"annotations": None, "audio": None, "function_call": None, "tool_calls": None}
    response = await client.post(URL, json={"messages": [*HELLO, message | nulls, *HELLO]})
    assert response.status_code == 200
    assert "x-ignored-params" not in response.headers


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ("Hi", "messages"),
        (None, "messages"),
        ([{"content": "x"}], "messages[0].role"),
        ([{"role": "robot", "content": "x"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": None}], "messages[0].content"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        ([{"role": "user", "content": []}], "messages[0].content"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            "messages[0].content[0].type",
        ),
        ([{"role": "user", "content": [{"text": "x"}]}], "messages[0].content[0].type"),
        (
            [*HELLO, {"role": "user", "content": [{"type": "text", "text": 5}]}],
            "messages[1].content[0].text",
        ),
        ([{"role": "assistant", "tool_calls": [{"function": {}}]}], "messages[0].tool_calls"),
    ],
)
async def test_wrong_messages_are_refused_by_their_path(
    client: httpx.AsyncClient, messages: Any, param: str
) -> None:
    error = await refuse(client, messages=messages)
    assert error["param"].startswith(param)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("functions", [{"name": "f"}]),
        ("function_call", "auto"),
    ],
)
async def test_fields_that_newer_ones_replaced_are_refused(
    client: httpx.AsyncClient, field: str, value: Any
) -> None:
    error = await refuse(client, **{field: value})
    assert (error["code"], error["param"]) == ("unsupported_parameter", field)


async def test_a_template_in_a_request_needs_the_operators_leave(
    client: httpx.AsyncClient, make_app: Callable[..., FastAPI], engine: FakeEngine
) -> None:
    error = await refuse(client, 403, chat_template="x")
    assert error["type"] == "permission_error"
    async with talking_to(make_app(allow_request_chat_template=True)) as allowed:
        await ask(
            allowed,
            chat_template="{{ messages[0]['content'] }}{{ extra }}",
            chat_template_kwargs={"extra": "!"},
        )
        assert bytes(engine.submitted[0]["prompt"]) == b"Hi!"
        error = await refuse(allowed, chat_template="{{ nonsense( }}")
        assert error["param"] == "chat_template"


async def test_logprobs_carry_bytes_and_alternatives(client: httpx.AsyncClient) -> None:
    choice = (await ask(client, logprobs=True, top_logprobs=2))["choices"][0]
    first = choice["logprobs"]["content"][0]
    assert first == {
        "token": "H",
        "logprob": -0.72,
        "bytes": [72],
        "top_logprobs": [
            {"token": "A", "logprob": -0.65, "bytes": [65]},
            {"token": "B", "logprob": -0.66, "bytes": [66]},
        ],
    }
    assert choice["logprobs"]["refusal"] is None
    assert (await refuse(client, top_logprobs=2))["param"] == "top_logprobs"
    assert (await refuse(client, logprobs=5))["param"] == "logprobs"


async def test_a_conversation_too_long_names_the_messages(client: httpx.AsyncClient) -> None:
    error = await refuse(client, messages=[{"role": "user", "content": "x" * 300}])
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")


async def test_token_ids_and_prompt_logprobs_are_told_on_demand(client: httpx.AsyncClient) -> None:
    answer = await ask(client, return_token_ids=True, prompt_logprobs=0, max_tokens=2)
    assert answer["choices"][0]["token_ids"] == [72, 101]
    assert len(answer["prompt_logprobs"]) == len(answer["prompt_token_ids"])
    assert answer["prompt_logprobs"][0] is None


@pytest.mark.parametrize(
    ("content", "words"),
    [([], "at least 1 item"), (["a"], "JSON object"), ([{"text": "a"}], "required")],
)
async def test_odd_contents_are_told_in_words_that_fit_them(
    client: httpx.AsyncClient, content: list[object], words: str
) -> None:
    response = await client.post(URL, json={"messages": [{"role": "user", "content": content}]})
    assert response.status_code == 400
    assert words in response.json()["error"]["message"]
