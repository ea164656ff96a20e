"""Tools, reasoning and JSON through /v1/responses and /v1/messages, with the official packages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import anthropic
import openai
import pytest
from anthropic.types import MessageParam, ToolParam
from openai.types.responses import FunctionToolParam
from pydantic import BaseModel

from model.chat_template import ChatTemplate
from service.api.app import create_app
from service.registry import ModelRegistry
from service.settings import Settings
from tests.api.fakes import FakeEngine, say, served
from tests.api.live import listening

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
BROKEN = '<tool_call>\n{"name": "weather", "arguments": {"city": nowhere}}\n</tool_call>'
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% for c in m.tool_calls %}<tool_call>{{ c.function.name }}{{ c.function.arguments | tojson }}"
    "</tool_call>{% endfor %}\n{% endfor %}{% if tools %}{{ tools | tojson }}{% endif %}"
    "{# <think> </think> #}"
)
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
FUNCTION: FunctionToolParam = {
    "type": "function",
    "name": "weather",
    "parameters": SCHEMA,
    "strict": True,
}
TOOL: ToolParam = {"name": "weather", "input_schema": SCHEMA}  # type: ignore[typeddict-item]
HELLO: list[MessageParam] = [{"role": "user", "content": "Hi"}]


@contextmanager
def speaking(text: str) -> Iterator[tuple[str, FakeEngine]]:
    engine = FakeEngine(script=lambda prompt, one: say(text))
    model = served(engine)
    assert model.tokenizer is not None
    model = replace(
        model, max_model_len=4096, chat_template=ChatTemplate(TEMPLATE, model.tokenizer)
    )
    settings = Settings(reasoning_parser="think")
    with listening(create_app(settings, ModelRegistry([model]))) as url:
        yield url, engine


@contextmanager
def openai_client(text: str) -> Iterator[tuple[openai.OpenAI, FakeEngine]]:
    with (
        speaking(text) as (url, engine),
        openai.OpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0) as client,
    ):
        yield client, engine


@contextmanager
def anthropic_client(text: str) -> Iterator[tuple[anthropic.Anthropic, FakeEngine]]:
    with (
        speaking(text) as (url, engine),
        anthropic.Anthropic(base_url=url, api_key="k", max_retries=0) as client,
    ):
        yield client, engine


def prompt_of(engine: FakeEngine) -> str:
    ids = engine.submitted[-1]["prompt"]
    assert isinstance(ids, list)
    return bytes(token for token in ids if token < 256).decode()


def test_a_response_calls_a_function_and_goes_on_with_its_output() -> None:
    with openai_client(f"<think>hm</think>Let me see.{CALL}") as (client, engine):
        first = client.responses.create(model="tiny", input="Hi", tools=[FUNCTION])
        reasoning, message, call = first.output
        assert reasoning.type == "reasoning"
        assert reasoning.content is not None
        assert reasoning.content[0].text == "hm"
        assert message.type == "message"
        assert first.output_text == "Let me see."
        assert call.type == "function_call"
        assert (call.name, call.arguments) == ("weather", '{"city":"Köln"}')
        assert first.usage is not None
        assert 0 < first.usage.output_tokens_details.reasoning_tokens < len("<think>hm</think>Let")
        engine.script = lambda prompt, one: say("Rain.")
        output = {"type": "function_call_output", "call_id": call.call_id, "output": "wet"}
        history: Any = [{"role": "user", "content": "Hi"}, *first.output, output]
        second = client.responses.create(model="tiny", input=history, tools=[FUNCTION])
        assert second.output_text == "Rain."
        assert 'assistant: Let me see.<tool_call>weather{"city":' in prompt_of(engine)
        assert "tool: wet" in prompt_of(engine)


def test_a_streamed_call_is_the_same_as_a_whole_one() -> None:
    with openai_client(f"<think>hm</think>{CALL}{CALL}") as (client, _):
        whole = client.responses.create(model="tiny", input="Hi", tools=[FUNCTION])
        with client.responses.stream(model="tiny", input="Hi", tools=[FUNCTION]) as stream:
            events = list(stream)
            final = stream.get_final_response()
    told = [(item.type, getattr(item, "arguments", None)) for item in whole.output]
    assert [(item.type, getattr(item, "arguments", None)) for item in final.output] == told
    assert [kind for kind, _ in told] == ["reasoning", "function_call", "function_call"]
    snapshots = [
        event.snapshot for event in events if event.type == "response.function_call_arguments.delta"
    ]
    assert snapshots.count('{"city":"Köln"}') == 2


def test_a_call_that_breaks_is_text_in_the_end() -> None:
    with openai_client(BROKEN) as (client, _):
        whole = client.responses.create(model="tiny", input="Hi", tools=[FUNCTION])
        with client.responses.create(
            model="tiny", input="Hi", tools=[FUNCTION], stream=True
        ) as stream:
            *_, last = list(stream)
    assert [item.type for item in whole.output] == ["message"]
    assert whole.output_text == BROKEN
    assert last.type == "response.completed"
    assert last.response.output_text == BROKEN


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "weather"}])
def test_required_and_named_functions_are_held_to_a_grammar(choice: Any) -> None:
    calls = '[{"name":"weather","parameters":{"city":"K"}}]'
    text = calls if choice == "required" else '{"city":"K"}'
    with openai_client(text) as (client, engine):
        response = client.responses.create(
            model="tiny", input="Hi", tools=[FUNCTION], tool_choice=choice
        )
        assert engine.submitted[-1]["grammar"]
    assert [item.type for item in response.output] == ["function_call"]


class City(BaseModel):
    city: str


def test_a_response_is_parsed_into_a_model() -> None:
    with openai_client('{"city":"Köln"}') as (client, engine):
        response = client.responses.parse(model="tiny", input="Hi", text_format=City)
        assert response.output_parsed == City(city="Köln")
        grammar = str(engine.submitted[-1]["grammar"])
        assert "%json" in grammar
        assert "city" in grammar
        with client.responses.stream(model="tiny", input="Hi", text_format=City) as stream:
            final = stream.get_final_response()
        assert final.output_parsed == City(city="Köln")


def test_a_message_uses_a_tool_and_goes_on_with_its_result() -> None:
    with anthropic_client(f"<think>hm</think>Let me see.{CALL}") as (client, engine):
        first = client.messages.create(model="tiny", max_tokens=500, messages=HELLO, tools=[TOOL])
        thinking, text, use = first.content
        assert thinking.type == "thinking"
        assert thinking.thinking == "hm"
        assert text.type == "text"
        assert text.text == "Let me see."
        assert use.type == "tool_use"
        assert (use.name, use.input) == ("weather", {"city": "Köln"})
        assert first.stop_reason == "tool_use"
        assert first.usage.output_tokens_details is not None
        assert first.usage.output_tokens_details.thinking_tokens > 0
        with client.messages.stream(
            model="tiny", max_tokens=500, messages=HELLO, tools=[TOOL]
        ) as stream:
            final = stream.get_final_message()
        assert [block.type for block in final.content] == ["thinking", "text", "tool_use"]
        assert final.content[2].to_dict()["input"] == {"city": "Köln"}
        assert final.usage == first.usage
        engine.script = lambda prompt, one: say("Rain.")
        result = {"type": "tool_result", "tool_use_id": use.id, "content": "wet"}
        history: Any = [
            *HELLO,
            {"role": "assistant", "content": first.content},
            {"role": "user", "content": [result]},
        ]
        client.messages.create(model="tiny", max_tokens=500, messages=history, tools=[TOOL])
        assert 'assistant: Let me see.<tool_call>weather{"city":' in prompt_of(engine)
        assert "tool: wet" in prompt_of(engine)


def test_a_message_is_held_to_a_tool_and_to_a_format() -> None:
    with anthropic_client('{"city":"K"}') as (client, engine):
        message = client.messages.create(
            model="tiny",
            max_tokens=500,
            messages=HELLO,
            tools=[TOOL],
            tool_choice={"type": "tool", "name": "weather"},
        )
        assert [block.type for block in message.content] == ["tool_use"]
        assert engine.submitted[-1]["grammar"]
        client.messages.create(
            model="tiny",
            max_tokens=500,
            messages=HELLO,
            output_config={"format": {"type": "json_schema", "schema": SCHEMA}},
        )
        assert "city" in str(engine.submitted[-1]["grammar"])


def test_counted_tokens_are_those_of_tools_too() -> None:
    with anthropic_client("x") as (client, _):
        counted = client.messages.count_tokens(model="tiny", messages=HELLO, tools=[TOOL])
        whole = client.messages.create(model="tiny", max_tokens=5, messages=HELLO, tools=[TOOL])
    assert counted.input_tokens == whole.usage.input_tokens


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [FUNCTION, FUNCTION]}, "tools[1].name"),
        ({"tools": [FUNCTION | {"name": "a b"}]}, "tools[0].name"),
        ({"tools": [FUNCTION], "tool_choice": {"type": "function", "name": "x"}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
    ],
)
def test_wrong_tools_are_refused_in_the_words_that_came(fields: Any, param: str) -> None:
    with (
        openai_client("x") as (client, _),
        pytest.raises(openai.BadRequestError) as refused,
    ):
        client.responses.create(model="tiny", input="Hi", **fields)
    assert refused.value.param is not None
    assert refused.value.param.startswith(param)
    assert "function.name" not in refused.value.message
