"""Hostile bytes on every wire: bodies, events, frames between the processes, schemas."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from random import Random
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Struct
from pydantic import ValidationError

from service.api.body import parse, parse_json
from service.api.constraints import MAX_SCHEMA, read_constraint
from service.api.json_schemas import moved, without_annotations
from service.api.schemas.chat import ChatRequest
from service.api.schemas.completions import CompletionRequest
from service.api.schemas.sampling import SamplingFields
from service.api.stream import DONE, PING, frame, named_frame
from service.bench.events import EventLines, message_of
from service.engine.framing import LENGTH_BYTES, MAX_FRAME, BrokenFrame, FrameReader, encode_frame
from service.engine.messages import FromEngine, ToEngine
from service.errors import InvalidRequest
from tests.engine.test_framing import MESSAGES
from tests.fuzz.mutations import ODD_TEXTS, ODD_VALUES, damaged_bytes, damaged_document
from tests.fuzz.test_texts import FEW, cuts, many

# --------------------------------------------------------------------------- server-sent events


class Chunk(Struct, tag="response.output_text.delta"):
    text: str
    more: list[str] = []


BREAKS = ["\n", "\r", "\r\n", "\n\n", "\u2028", "\u2029", "\x85", "\0", "\x1b", "\x0b", "\ufeff"]
any_text = st.lists(
    st.sampled_from([*BREAKS, "data: [DONE]\n\n", "event: x", ": ping", "🦙", '"', "\\"])
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
    max_size=10,
).map("".join)


def events_of(stream: bytes) -> list[tuple[str, str]]:
    """(name, data) as the HTML standard reads a stream: any of three line ends, and no others."""
    text = stream.decode().replace("\r\n", "\n").replace("\r", "\n")
    found, name, data = [], "", []
    for line in text.split("\n"):
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if not line:
            if data:
                found.append((name, "\n".join(data)))
            name, data = "", []
        elif field == "data":
            data.append(value)
        elif field == "event":
            name = value
    return found


@pytest.mark.parametrize("examples", FEW)
def test_any_text_is_one_event_and_comes_back(examples: int) -> None:
    @many(examples)
    @given(st.lists(any_text, max_size=4), st.booleans(), cuts)
    def stream(texts: list[str], is_named: bool, places: list[int]) -> None:
        write = named_frame if is_named else frame
        chunks = [Chunk(text, [text]) for text in texts]
        sent = b"".join([*(PING + write(chunk) for chunk in chunks), DONE])
        events = events_of(sent)
        assert [name for name, _ in events[:-1]] == [Chunk.__struct_config__.tag * is_named] * len(
            texts
        )
        assert [json.loads(data)["text"] for _, data in events[:-1]] == texts
        assert events[-1] == ("", "[DONE]")
        lines, ends = EventLines(), sorted({0, len(sent), *(p for p in places if p < len(sent))})
        seen = [data for a, b in pairwise(ends) for data in lines.push(sent[a:b])]
        assert seen == [data.encode() for _, data in events]

    stream()


@pytest.mark.parametrize("examples", FEW)
def test_the_load_generator_reads_any_bytes_the_same_however_they_are_cut(examples: int) -> None:
    pieces = st.sampled_from(
        [b"data:", b"data: ", b"\n", b"\r\n", b"\r", b": c", b"event: x", b"{"]
    )

    @many(examples)
    @given(st.lists(pieces | st.binary(max_size=6), max_size=20).map(b"".join), cuts)
    def read(sent: bytes, places: list[int]) -> None:
        whole, parts = EventLines(), EventLines()
        ends = sorted({0, len(sent), *(place for place in places if place < len(sent))})
        cut = [data for a, b in pairwise(ends) for data in parts.push(sent[a:b])]
        assert cut == list(whole.push(sent))
        assert len(message_of(sent)) <= 200

    read()


# --------------------------------------------------------------------------- the engine's socket


FRAMES = b"".join(map(encode_frame, MESSAGES))


@pytest.mark.parametrize("examples", FEW)
def test_damaged_frames_end_the_connection_and_nothing_else(examples: int) -> None:
    @many(examples)
    @given(st.randoms(use_true_random=False), cuts, st.sampled_from([ToEngine, FromEngine]))
    def receive(chance: Random, places: list[int], kinds: Any) -> None:
        sent = damaged_bytes(chance, FRAMES)
        reader: FrameReader[Any] = FrameReader(kinds)
        ends = sorted({0, len(sent), *(place for place in places if place < len(sent))})
        try:
            for start, end in pairwise(ends):
                assert all(isinstance(one, Struct) for one in reader.feed(sent[start:end]))
        except BrokenFrame as error:
            assert len(str(error)) < 1000  # noqa: PT017 whether it is one depends on the damage

    receive()


@given(st.integers(MAX_FRAME + 1, 2**32 - 1))
def test_a_length_past_the_bound_is_refused_before_a_byte_of_it_is_kept(length: int) -> None:
    with pytest.raises(BrokenFrame):
        FrameReader[Any](ToEngine).feed(length.to_bytes(LENGTH_BYTES, "little"))


# --------------------------------------------------------------------------- bodies


GOOD: dict[type[Any], dict[str, Any]] = {
    CompletionRequest: {
        "model": "m", "prompt": ["a", "b"], "max_tokens": 5, "stop": ["x"], "seed": 1,
        "logit_bias": {"1": 2.0}, "stream": True, "stream_options": {"include_usage": True},
    },
    ChatRequest: {
        "model": "m",
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "hi"}]},
            {"role": "assistant", "content": None, "tool_calls": [
                {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
            {"role": "tool", "tool_call_id": "c", "content": "1"},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {
            "type": "object", "properties": {"a": {"type": "string"}}}}}],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {}}},
    },
}  # fmt: skip


def finite(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(finite, value.values()))
    if isinstance(value, list):
        return all(map(finite, value))
    return not isinstance(value, float) or math.isfinite(value)


@pytest.mark.parametrize("examples", [pytest.param(200), pytest.param(20_000, marks=FEW[1].marks)])
def test_any_body_is_a_request_or_refused_in_short(examples: int) -> None:
    @many(examples)
    @given(st.sampled_from(list(GOOD)), st.randoms(use_true_random=False), st.booleans())
    def body(model: Any, chance: Random, in_bytes: bool) -> None:
        sent = json.dumps(damaged_document(chance, GOOD[model])).encode()
        sent = damaged_bytes(chance, sent) if in_bytes else sent
        try:
            request = parse(sent, model)
        except InvalidRequest as error:
            assert len(error.message) < 2000  # noqa: PT017
            error.message.encode()
            return
        assert isinstance(request, model)
        assert finite(parse_json(sent))

    body()


@pytest.mark.parametrize("examples", FEW)
def test_what_the_parser_takes_is_strict_json(examples: int) -> None:
    @many(examples)
    @given(st.binary(max_size=40) | any_text.map(str.encode))
    def read(sent: bytes) -> None:
        try:
            found = parse_json(sent)
        except InvalidRequest:
            return
        assert json.loads(sent.decode(), parse_constant=pytest.fail) == found

    read()


# --------------------------------------------------------------------------- schemas


SCHEMA = {
    "type": "object",
    "properties": {
        "a": {"type": "string", "pattern": "^a+$", "format": "date"},
        "format": {"enum": ["x", 1, None]},
        "b": {"type": "array", "items": {"$ref": "#/$defs/n"}, "minItems": 1},
    },
    "required": ["a"],
    "additionalProperties": False,
    "$defs": {"n": {"anyOf": [{"type": "integer", "minimum": 0}, {"const": {"$ref": "#/x"}}]}},
}


def fields_of(chance: Random) -> dict[str, Any]:
    schema = damaged_document(chance, SCHEMA)
    text = chance.choice([*ODD_TEXTS, json.dumps(SCHEMA), "root ::= 'a'", "a|b", "(" * 3000])
    deep = '%llguidance {"a": ' + "[" * 20_000 + "\nstart: /a/"
    return chance.choice(
        [
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "schema": schema},
                }
            },
            {"structured_outputs": {"json": chance.choice([schema, text, *ODD_VALUES])}},
            {"structured_outputs": {"regex": text}},
            {"structured_outputs": {"choice": [text, "b"]}},
            {
                "structured_outputs": {
                    "grammar": chance.choice([text, deep, f"%llguidance {text}\n"])
                }
            },
            {"guided_json": json.dumps(schema)},
        ]
    )


@pytest.mark.parametrize("examples", [pytest.param(300), pytest.param(20_000, marks=FEW[1].marks)])
def test_any_constraint_is_a_grammar_of_bounded_size_or_refused(examples: int) -> None:
    @many(examples)
    @given(st.randoms(use_true_random=False))
    def constrain(chance: Random) -> None:
        try:
            fields = SamplingFields.model_validate(fields_of(chance))
            constraint = read_constraint(fields)
        except (InvalidRequest, ValidationError):
            return
        if constraint is not None:
            assert len(constraint.grammar) < 4 * MAX_SCHEMA
            assert isinstance(json.loads(constraint.grammar), dict)

    constrain()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text("ab") | st.sampled_from(["#/a", "date"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["properties", "$ref", "format", "enum", "const", "items", "$defs", "x"]),
        inner, max_size=4,
    ),
)  # fmt: skip


@pytest.mark.parametrize("examples", FEW)
def test_rewriting_a_schema_leaves_it_alone_and_is_done_once(examples: int) -> None:
    @many(examples)
    @given(st.dictionaries(st.sampled_from(["properties", "items", "allOf", "$ref"]), json_values))
    def rewrite(schema: dict[str, Any]) -> None:
        before = msgspec.json.encode(schema)
        plain = without_annotations(schema)
        assert without_annotations(plain) == plain
        assert moved(schema, "#") == schema
        moved(schema, "#/$defs/f")
        assert msgspec.json.encode(schema) == before

    rewrite()
