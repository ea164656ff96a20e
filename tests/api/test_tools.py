"""Tools and reasoning through the whole API: fields, prompts, answers whole and streamed, usage."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from model.chat_template import ChatTemplate, load_chat_template
from model.tokenizer import Segment, Tokenizer, load_tokenizer
from model.tokenizer.config import TokenizerConfig
from model.tokenizer.special import AddedToken
from service.api.app import create_app
from service.api.dialects import HERMES as HERMES_DIALECT
from service.api.dialects import LLAMA_JSON, Dialect, dialect_of, shown_ids
from service.api.schemas.chat import Message
from service.api.tool_messages import template_messages
from service.registry import ModelRegistry
from service.settings import Settings
from tests.api.conftest import chunks_of, talking_to
from tests.api.fakes import BOS, EOS, SPECIAL, ByteTokenizer, FakeEngine, say, served

URL = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hi"}]
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": CITY}}
TIME = {"type": "function", "function": {"name": "get_time"}}
CALL_TEXT = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln"}}\n</tool_call>'
HERMES = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% for c in m.tool_calls %}<tool_call>{{ c.function.name }}{{ c.function.arguments | tojson }}"
    "</tool_call>{% endfor %}\n{% endfor %}{% if tools %}{{ tools | tojson }}{% endif %}"
)
TAG, THINK = 270, 271


class MarkedTokenizer(ByteTokenizer):
    """With a marker that is special and one that is a token of its own."""

    def __init__(self) -> None:
        Tokenizer.__init__(
            self,
            TokenizerConfig(named_tokens={"bos_token": "<s>", "eos_token": "</s>"}),
            [
                *(AddedToken(token, text) for text, token in SPECIAL.items()),
                AddedToken(TAG, "<|python_tag|>"),
                AddedToken(THINK, "</think>", special=False),
            ],
            vocab_size=272,
            prefix=(BOS,),
            suffix=(),
            drops_first_space=False,
        )

    def _encode_segments(self, segments: list[Segment]) -> list[int]:
        known = {token.text: token.id for token in self.added.values()}
        ids: list[int] = []
        for segment in segments:
            ids += [known[segment.text]] if segment.is_special else list(segment.text.encode())
        return ids


@asynccontextmanager
async def chatting(
    engine: FakeEngine,
    template: str | None = None,
    tokenizer: Tokenizer | None = None,
    **given: Any,
) -> AsyncIterator[httpx.AsyncClient]:
    model = served(engine)
    tokenizer = tokenizer or model.tokenizer
    assert tokenizer is not None
    model = replace(model, max_model_len=4096, tokenizer=tokenizer, vocab_size=272)
    if template is not None:
        model = replace(model, chat_template=ChatTemplate(template, tokenizer))
    async with talking_to(create_app(Settings(**given), ModelRegistry([model]))) as client:
        yield client


def saying(text: str | Sequence[int]) -> FakeEngine:
    tokens = say(text) if isinstance(text, str) else [*text, EOS]
    return FakeEngine(script=lambda prompt, one: tokens)


async def ask(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    response = await client.post(URL, json={"messages": HELLO} | fields)
    assert response.status_code == 200, response.text
    return response.json()


def prompt_of(engine: FakeEngine, number: int = -1) -> str:
    return bytes(token for token in engine.submitted[number]["prompt"] if token < 256).decode()


def calls_of(message: dict[str, Any]) -> list[tuple[str, Any]]:
    assert all(call["type"] == "function" and call["id"] for call in message["tool_calls"])
    functions = [call["function"] for call in message["tool_calls"]]
    return [(one["name"], json.loads(one["arguments"])) for one in functions]


async def stream(client: httpx.AsyncClient, **fields: Any) -> list[dict[str, Any]]:
    response = await client.post(URL, json={"messages": HELLO, "stream": True} | fields)
    assert response.status_code == 200, response.text
    return chunks_of(response.text)


def joined(chunks: list[dict[str, Any]], index: int = 0) -> dict[str, Any]:
    """A choice's deltas as one message, with its finish reason; asserts how calls begin."""
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": []}
    for chunk in chunks:
        for choice in (one for one in chunk["choices"] if one["index"] == index):
            delta = choice["delta"]
            message["content"] += delta.get("content") or ""
            message["reasoning_content"] += delta.get("reasoning_content") or ""
            for call in delta.get("tool_calls", ()):
                if "id" in call:
                    assert call["index"] == len(message["tool_calls"])
                    message["tool_calls"].append({**call, "function": dict(call["function"])})
                else:
                    known = message["tool_calls"][call["index"]]["function"]
                    known["arguments"] += call["function"]["arguments"]
            message["finish_reason"] = choice["finish_reason"]
    return message


# ---- auto


async def test_a_call_comes_whole_and_streamed_the_same() -> None:
    engine = saying(f"Let me look.\n\n{CALL_TEXT}")
    async with chatting(engine, HERMES) as client:
        choice = (await ask(client, tools=[WEATHER]))["choices"][0]
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["content"] == "Let me look."
        assert calls_of(choice["message"]) == [("get_weather", {"city": "Köln"})]
        engine.group = 3
        chunks = await stream(client, tools=[WEATHER], logprobs=True)
        message = joined(chunks)
        assert message["finish_reason"] == "tool_calls"
        assert message["content"] == "Let me look."
        assert calls_of(message) == [("get_weather", {"city": "Köln"})]
        pieces = [
            call["function"]["arguments"]
            for chunk in chunks
            for one in chunk["choices"]
            for call in one["delta"].get("tool_calls", ())
        ]
        assert len([piece for piece in pieces if piece]) > 3, "arguments are streamed"
        tokens = [
            record["token"]
            for chunk in chunks
            for one in chunk["choices"]
            for record in (one["logprobs"] or {"content": []})["content"]
        ]
        assert len(tokens) == len(engine.script([], None)), "each token has its logprob"  # type: ignore[arg-type]


async def test_content_is_null_where_calls_are_all() -> None:
    async with chatting(saying(CALL_TEXT), HERMES) as client:
        message = (await ask(client, tools=[WEATHER]))["choices"][0]["message"]
        assert message["content"] is None


async def test_each_choice_has_calls_of_its_own() -> None:
    texts = [say(CALL_TEXT), say("No.")]
    engine = FakeEngine(script=lambda prompt, one: texts[one.choice], group=4)
    async with chatting(engine, HERMES) as client:
        choices = (await ask(client, tools=[WEATHER], n=2))["choices"]
        assert [choice["finish_reason"] for choice in choices] == ["tool_calls", "stop"]
        chunks = await stream(client, tools=[WEATHER], n=2)
        assert calls_of(joined(chunks, 0)) == [("get_weather", {"city": "Köln"})]
        assert joined(chunks, 1)["content"] == "No."


async def test_a_cut_call_says_length() -> None:
    async with chatting(saying(CALL_TEXT), HERMES) as client:
        choice = (await ask(client, tools=[WEATHER], max_tokens=60))["choices"][0]
        assert choice["finish_reason"] == "length"
        assert choice["message"]["tool_calls"][0]["function"]["arguments"].startswith('{"city":"K')


async def test_a_stop_string_ends_before_a_call() -> None:
    async with chatting(saying(f"So. {CALL_TEXT}"), HERMES) as client:
        choice = (await ask(client, tools=[WEATHER], stop=["<tool"]))["choices"][0]
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "<tool")
        assert choice["message"]["content"] == "So. "


@pytest.mark.parametrize("fields", [{}, {"tools": [WEATHER], "tool_choice": "none"}, {"tools": []}])
async def test_without_tools_text_stays_text(fields: dict[str, Any]) -> None:
    engine = saying(CALL_TEXT)
    async with chatting(engine, HERMES) as client:
        choice = (await ask(client, **fields))["choices"][0]
        assert (choice["finish_reason"], choice["message"]["content"]) == ("stop", CALL_TEXT)
        assert "get_weather" not in prompt_of(engine)


async def test_one_call_where_they_may_not_be_parallel() -> None:
    async with chatting(saying(f"{CALL_TEXT}\n{CALL_TEXT}"), HERMES) as client:
        for parallel, count in ((True, 2), (False, 1)):
            answer = await ask(client, tools=[WEATHER], parallel_tool_calls=parallel)
            assert len(answer["choices"][0]["message"]["tool_calls"]) == count


async def test_a_broken_call_is_content_and_the_stream_says_stop() -> None:
    text = CALL_TEXT.replace("}}", "}]")
    engine = saying(text)
    async with chatting(engine, HERMES) as client:
        choice = (await ask(client, tools=[WEATHER]))["choices"][0]
        assert (choice["finish_reason"], choice["message"]["content"]) == ("stop", text)
        assert "tool_calls" not in choice["message"]
        message = joined(await stream(client, tools=[WEATHER]))
        assert (message["finish_reason"], message["content"]) == ("stop", text)


async def test_special_markers_are_seen_and_other_special_tokens_are_not() -> None:
    tokens = [SPECIAL["<|user|>"], TAG, *b'{"name": "f", "parameters": {}}', SPECIAL["<|user|>"]]
    async with chatting(saying(tokens), tokenizer=MarkedTokenizer()) as client:
        message = (await ask(client, tools=[WEATHER]))["choices"][0]["message"]
        assert (message["content"], calls_of(message)) == (None, [("f", {})])
        message = (await ask(client))["choices"][0]["message"]
        assert message["content"] == '{"name": "f", "parameters": {}}'


async def test_the_operator_may_name_the_parser() -> None:
    engine = saying('[get_weather(city="Köln")]')
    for parser, has_calls in (("auto", False), ("pythonic", True)):
        async with chatting(engine, HERMES, tool_call_parser=parser) as client:
            message = (await ask(client, tools=[WEATHER]))["choices"][0]["message"]
            assert ("tool_calls" in message) is has_calls


# ---- required and named


def schema_sent(engine: FakeEngine) -> dict[str, Any]:
    """The JSON schema inside the grammar of the last request the engine got."""
    grammar = json.loads(str(engine.submitted[-1]["grammar"]))["grammars"][0]["lark_grammar"]
    schema: dict[str, Any] = json.loads(grammar.partition("start: %json ")[2])
    return schema


async def test_required_and_named_are_held_to_their_schemas() -> None:
    engine = saying('[{"name":"get_weather","parameters":{"city":"Köln"}}]')
    async with chatting(engine, HERMES) as client:
        fields = {"tools": [WEATHER, TIME], "tool_choice": "required"}
        choice = (await ask(client, **fields))["choices"][0]
        assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", None)
        assert calls_of(choice["message"]) == [("get_weather", {"city": "Köln"})]
        assert schema_sent(engine)["minItems"] == 1
        chunks = await stream(client, **fields)
        assert "content" not in chunks[0]["choices"][0]["delta"]
        assert joined(chunks)["finish_reason"] == "tool_calls"
        assert calls_of(joined(chunks)) == [("get_weather", {"city": "Köln"})]

        engine.script = lambda prompt, one: say('{"city":"Köln"}')
        named = {"type": "function", "function": {"name": "get_weather"}}
        fields = {"tools": [WEATHER, TIME], "tool_choice": named}
        choice = (await ask(client, **fields))["choices"][0]
        assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", None)
        assert calls_of(choice["message"]) == [("get_weather", {"city": "Köln"})]
        assert schema_sent(engine)["required"] == ["city"]
        cut = (await ask(client, **fields, max_tokens=5))["choices"][0]
        assert (cut["finish_reason"], cut["message"]["content"]) == ("length", None)
        fields["tool_choice"] = "required"
        engine.script = lambda prompt, one: say('[{"name":"get_weather"')
        cut = (await ask(client, **fields, max_tokens=5))["choices"][0]
        assert (cut["finish_reason"], cut["message"]["content"]) == ("length", None)


async def test_auto_is_free() -> None:
    engine = saying("No.")
    async with chatting(engine, HERMES) as client:
        await ask(client, tools=[WEATHER], tool_choice="auto")
        assert engine.submitted[-1]["grammar"] == ""


async def test_allowed_tools_are_those_the_model_is_told_of() -> None:
    engine = saying("No.")
    name = {"type": "function", "function": {"name": "get_time"}}
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [name]}}
    async with chatting(engine, HERMES) as client:
        await ask(client, tools=[WEATHER, TIME], tool_choice=choice)
        assert "get_time" in prompt_of(engine)
        assert "get_weather" not in prompt_of(engine)


# ---- fields


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"a": schema}
    return schema


def function(**fields: Any) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": "f"} | fields}]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "custom", "custom": {}}]}, "tools[0]"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": function(name="a b")}, "tools[0].function.name"),
        ({"tools": function(name="a" * 65)}, "tools[0].function.name"),
        ({"tools": function(name="")}, "tools[0].function.name"),
        ({"tools": function(parameters={"type": "array"})}, "tools[0].function.parameters"),
        ({"tools": function(parameters=[])}, "tools[0].function.parameters"),
        ({"tools": function() * 2}, "tools[1].function.name"),
        ({"tools": [WEATHER] * 129}, "tools"),
        ({"tools": function(description="x" * 300_000)}, "tools"),
        ({"tools": function(parameters=nested(70))}, "tools[0].function"),
        ({"tools": function(parameters=nested(200))}, "tools[0].function"),
        ({"tools": function(more=nested(200))}, "tools[0].function"),
        ({"tools": "f"}, "tools"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"tool_choice": "required", "tools": []}, "tool_choice"),
        ({"tool_choice": "sometimes", "tools": [WEATHER]}, "tool_choice"),
        ({"tool_choice": {"type": "function"}, "tools": [WEATHER]}, "tool_choice.function"),
        ({"tool_choice": {"a": {}}, "tools": [WEATHER]}, "tool_choice.type"),
        (
            {"tool_choice": {"type": "function", "function": {"name": "f"}}, "tools": [WEATHER]},
            "tool_choice.function.name",
        ),
        ({"parallel_tool_calls": "yes", "tools": [WEATHER]}, "parallel_tool_calls"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"function_call": "auto"}, "function_call"),
    ],
)
async def test_wrong_tools_are_refused_by_their_path(fields: dict[str, Any], param: str) -> None:
    async with chatting(saying("No."), HERMES) as client:
        response = await client.post(URL, json={"messages": HELLO} | fields)
        assert response.status_code == 400, response.text
        error = response.json()["error"]
        assert error["param"].startswith(param)
        assert "literal[" not in str(error)


async def test_tokenize_counts_what_a_chat_with_tools_sends() -> None:
    engine = saying("No.")
    for template in (HERMES, None):
        async with chatting(engine, template) as client:
            body = {"messages": HELLO, "tools": [WEATHER]}
            response = await client.post("/tokenize", json=body)
            await ask(client, tools=[WEATHER])
            assert response.json()["tokens"] == engine.submitted[-1]["prompt"]
            body["tools"] = function() * 2
            assert (await client.post("/tokenize", json=body)).status_code == 400


# ---- prompts

HISTORY = [
    {"role": "user", "content": "Weather?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "call_1",
                "type": "function",
                "function": {"name": "get_weather", "arguments": '{"city": "Köln"}'},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "Rain."},
    {"role": "tool", "tool_call_id": "call_2", "content": "Wind."},
]


async def test_templates_get_arguments_as_objects() -> None:
    engine = saying("Wet.")
    async with chatting(engine, HERMES) as client:
        await ask(client, tools=[WEATHER], messages=HISTORY)
        assert '<tool_call>get_weather{"city": "Köln"}</tool_call>' in prompt_of(engine)
        assert "None" not in prompt_of(engine)
        odd = json.loads(json.dumps(HISTORY))
        odd[1]["tool_calls"][0]["function"]["arguments"] = "no JSON"
        await ask(client, tools=[WEATHER], messages=odd)
        assert 'get_weather"no JSON"' in prompt_of(engine)


async def test_templates_that_write_arguments_as_they_are_get_text() -> None:
    engine = saying("Wet.")
    source = (
        "{% for m in messages %}{% for c in m.tool_calls %}{{ c.type + c['function']['name'] + "
        "c['function']['arguments'] }}{% endfor %}{% endfor %}{% if tools %}.{% endif %}"
    )
    async with chatting(engine, source) as client:
        await ask(client, tools=[WEATHER], messages=HISTORY)
        assert prompt_of(engine) == 'functionget_weather{"city": "Köln"}.'


async def test_a_template_without_tools_is_told_of_them_by_the_system() -> None:
    engine = saying(CALL_TEXT)
    async with chatting(engine) as client:
        for messages in (HISTORY, [{"role": "system", "content": "Be brief."}, *HISTORY]):
            choice = (await ask(client, tools=[WEATHER], messages=messages))["choices"][0]
            assert calls_of(choice["message"]) == [("get_weather", {"city": "Köln"})]
            prompt = prompt_of(engine)
            assert prompt.startswith("system: ")
            assert json.dumps(WEATHER) in prompt
            assert "<tool_call>" in prompt.partition("user:")[0]
            assert f"assistant: {CALL_TEXT}" in prompt
            results = "Rain.\n</tool_response>\n<tool_response>\nWind."
            assert f"user: <tool_response>\n{results}\n</tool_response>" in prompt
            assert prompt.count("system: ") == 1


async def test_calls_in_the_older_form_are_read_in_histories() -> None:
    engine = saying("Wet.")
    messages = [
        HELLO[0],
        {"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}},
        {"role": "function", "name": "f", "content": "Rain."},
    ]
    async with chatting(engine, HERMES) as client:
        await ask(client, messages=messages)
        assert "<tool_call>f{}</tool_call>tool: Rain." in prompt_of(engine)


async def test_mistrals_templates_get_short_ids() -> None:
    engine = saying("Wet.")
    source = (
        "[TOOL_CALLS]{{ tools is defined }}{% for m in messages %}{% for c in m.tool_calls %}"
        "{{ c.id }}{% endfor %}{{ ',' ~ m.tool_call_id if m.tool_call_id }}{% endfor %}"
    )
    async with chatting(engine, source) as client:
        await ask(client, tools=[WEATHER], messages=HISTORY[:3])
        first, second = prompt_of(engine).removeprefix("[TOOL_CALLS]True").split(",")
        assert first == second
        assert len(first) == 9


@pytest.mark.parametrize(("name", "dialect"), [("llama3", LLAMA_JSON), ("qwen2.5", HERMES_DIALECT)])
def test_real_templates_take_tools_and_show_their_dialect(
    shared_dir: Path, name: str, dialect: Dialect
) -> None:
    tokenizer = load_tokenizer(shared_dir / "models" / "tokenizers" / name)
    template = load_chat_template(tokenizer)
    assert template is not None
    assert template.reads_tools
    assert not template.quotes_arguments
    assert dialect_of(template.source, tokenizer, "auto") is dialect
    messages = [Message.model_validate(message) for message in HISTORY[:3]]
    said = template_messages(messages, dialect)
    text = "".join(segment.text for segment in template.render(said, tools=[WEATHER]))
    assert dialect.write_call("get_weather", '{"city": "Köln"}') in text
    assert '"get_weather"' in text.partition("Weather?")[0]
    is_special = name == "llama3"
    assert bool(shown_ids(dialect.markers, tokenizer)) is is_special


@pytest.mark.parametrize("name", ["smollm2", "mistral-chatml"])
def test_real_templates_that_know_no_tools_are_told_apart(shared_dir: Path, name: str) -> None:
    tokenizer = load_tokenizer(shared_dir / "models" / "tokenizers" / name)
    template = load_chat_template(tokenizer)
    assert template is not None
    assert not template.reads_tools


# ---- reasoning

THINKS = HERMES + "{# <think></think> #}{{ '</think>' if false }}"
OPENS = THINKS + "{% if add_generation_prompt %}<think>\n{% endif %}"


async def test_reasoning_is_split_out_and_counted() -> None:
    text = f"<think>\nHm, ö.\n</think>\n\nHere: {CALL_TEXT}"
    num_thought = len(text[: text.index("</think>") + 8].encode())
    engine = saying(text)
    async with chatting(engine, THINKS) as client:
        for group in (1, 5, 1000):
            engine.group = group
            answer = await ask(client, tools=[WEATHER])
            choice = answer["choices"][0]
            assert choice["message"]["reasoning_content"] == "Hm, ö."
            assert choice["message"]["content"] == "Here:"
            assert calls_of(choice["message"]) == [("get_weather", {"city": "Köln"})]
            assert choice["finish_reason"] == "tool_calls"
            details = answer["usage"]["completion_tokens_details"]
            assert details["reasoning_tokens"] == num_thought
            options = {"include_usage": True, "continuous_usage_stats": True}
            chunks = await stream(client, tools=[WEATHER], stream_options=options)
            message = joined(chunks)
            assert message["reasoning_content"] == "Hm, ö."
            assert message["content"] == "Here:"
            counts = [
                chunk["usage"]["completion_tokens_details"]["reasoning_tokens"] for chunk in chunks
            ]
            assert counts[-1] == num_thought
            assert counts == sorted(counts)


async def test_a_prompt_may_open_the_reasoning() -> None:
    engine = saying("Hm.\n</think>\n\nYes.")
    async with chatting(engine, OPENS) as client:
        answer = await ask(client)
        message = answer["choices"][0]["message"]
        assert (message["reasoning_content"], message["content"]) == ("Hm.", "Yes.")
        assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == 12
        answer = await ask(client, max_tokens=2)
        message = answer["choices"][0]["message"]
        assert (message["reasoning_content"], message["content"]) == ("Hm", "")
        assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == 2
        goes_on = [*HELLO, {"role": "assistant", "content": "<think>Let me"}]
        answer = await ask(client, messages=goes_on, continue_final_message=True)
        assert answer["choices"][0]["message"]["reasoning_content"] == "Hm."
        answer = await ask(client, messages=goes_on, continue_final_message=True, echo=True)
        assert answer["choices"][0]["message"]["reasoning_content"] == "Let meHm."


async def test_reasoning_can_be_left_in_the_text() -> None:
    engine = saying("<think>Hm.</think>Yes.")
    async with chatting(engine, THINKS, reasoning_parser="none") as client:
        message = (await ask(client))["choices"][0]["message"]
        assert message["content"] == "<think>Hm.</think>Yes."
        assert "reasoning_content" not in message
    async with chatting(engine, HERMES, reasoning_parser="qwen3") as client:
        assert (await ask(client))["choices"][0]["message"]["reasoning_content"] == "Hm."


async def test_a_tokenizer_that_knows_the_mark_is_a_sign_of_thoughts() -> None:
    engine = saying([*b"<think>Hm.", THINK, *b"Yes."])
    async with chatting(engine, HERMES, MarkedTokenizer()) as client:
        answer = await ask(client, n=2)
        messages = [choice["message"] for choice in answer["choices"]]
        assert [message["content"] for message in messages] == ["Yes.", "Yes."]
        assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == 2 * 11


async def test_thoughts_that_never_end_are_all_reasoning() -> None:
    async with chatting(saying("<think>Hm."), THINKS) as client:
        answer = await ask(client)
        message = answer["choices"][0]["message"]
        assert (message["reasoning_content"], message["content"]) == ("Hm.", "")
        details = answer["usage"]["completion_tokens_details"]
        assert details["reasoning_tokens"] == answer["usage"]["completion_tokens"]


FORCED = {"tools": [WEATHER], "tool_choice": "required"}


async def test_nothing_cuts_a_forced_call_short() -> None:
    engine = saying('[{"name":"get_weather","parameters":{"city":"Köln"}}]')
    async with chatting(engine, HERMES) as client:
        body = {"messages": HELLO, "stop": ["K"], "stop_token_ids": [75]} | FORCED
        response = await client.post(URL, json=body)
        assert response.headers["X-Ignored-Params"] == "stop, stop_token_ids"
        message = response.json()["choices"][0]["message"]
        assert calls_of(message) == [("get_weather", {"city": "Köln"})]
        assert (await client.post(URL, json=body | {"strict": True})).status_code == 400
        history = [*HELLO, {"role": "assistant", "content": "abc"}]
        echo = {"messages": history, "continue_final_message": True, "echo": True}
        refused = await client.post(URL, json=echo | FORCED)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "echo")


async def test_tools_that_a_schema_leaves_no_room_for_are_named() -> None:
    async with chatting(saying("{}"), HERMES) as client:
        body = {"messages": HELLO, "tools": [WEATHER], "response_format": {"type": "json_object"}}
        assert (await client.post(URL, json=body)).headers["X-Ignored-Params"] == "tools"


async def test_a_call_and_its_end_come_in_two_chunks() -> None:
    """Also where a stop string held all of the call back; each call's gains are one entry."""
    text = '<tool_call>{"name": "get_time", "arguments": {}}</tool_call>'
    async with chatting(saying(text), HERMES) as client:
        held = text[:-1] + "X"
        chunks = await stream(client, tools=[TIME], stop=[held])
        deltas = [chunk["choices"][0] for chunk in chunks]
        assert (deltas[-1]["delta"], deltas[-1]["finish_reason"]) == ({}, "tool_calls")
        for choice in deltas:
            indices = [call["index"] for call in choice["delta"].get("tool_calls", [])]
            assert len(indices) == len(set(indices))
