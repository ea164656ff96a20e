"""Readers of calls and thoughts: the same however the text is cut, nothing leaks, nothing lost."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.api.dialects import BRACKETS, DIALECTS, THINK, Dialect
from service.api.readers.constrained import NamedReader, RequiredReader
from service.api.readers.json_text import MAX_DEPTH
from service.api.readers.thinking import ThinkingReader
from service.api.reading import AnswerReader, Delta, PlainText

NAMES = ["f", "get_weather", "a-b_c"]
Call = tuple[str, dict[str, Any]]
DIALECT_NAMES = ["hermes", "llama3_json", "pythonic", "mistral"]


def reader_of(name: str, most_calls: int | None = None) -> AnswerReader:
    return DIALECTS[name].reader(NAMES, most_calls)


def read(reader: AnswerReader, pieces: Sequence[str]) -> Delta:
    whole = Delta()
    for piece in pieces:
        whole += reader.push(piece)
    return whole + reader.flush()


def calls_of(delta: Delta) -> list[tuple[str | None, Any]]:
    return [(call.name, json.loads(call.arguments)) for call in delta.whole_calls()]


def cut(text: str, places: list[int]) -> list[str]:
    borders = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    return [text[a:b] for a, b in pairwise(borders)]


def plain(delta: Delta) -> tuple[Any, ...]:
    """All that was said, without the ids, which are drawn."""
    calls = [(c.index, c.name, c.arguments) for c in delta.whole_calls()]
    return delta.content, delta.reasoning, calls


# ---- what each dialect means

F = [("f", {"a": 1})]
TWO = [("f", {"a": 1}), ("get_weather", {"city": "Köln", "days": [1, 2]})]
WEATHER = '{"name": "get_weather", "%s": {"city": "Köln", "days": [1, 2]}}'
READ = [  # dialect, text, content, calls
    ("hermes", '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>', "", F),
    ("hermes", 'Well.\n\n<tool_call>{"arguments":{"a":1},"name":"f"}</tool_call>\n', "Well.", F),
    (
        "hermes",
        '<tool_call>{"name":"f","arguments":{"a":1}}</tool_call>\n'
        f"<tool_call>\n{WEATHER % 'arguments'}\n</tool_call>",
        "",
        TWO,
    ),
    ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", F),
    ("hermes", '<tool_call>{"name": "f", "arguments": null}</tool_call>', "", [("f", {})]),
    ("hermes", '<tool_call>{"name": "f"}</tool_call> then', " then", [("f", {})]),
    ("hermes", '<tool_call>{"name": "no", "arguments": {}}</tool_call>', "", [("no", {})]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1}}', "", F),  # its end is missing
    ("hermes", 'a <tool_<tool_call>{"name":"f"}</tool_call>', "a <tool_", [("f", {})]),
    ("llama3_json", '{"name": "f", "parameters": {"a": 1}}', "", F),
    ("llama3_json", '<|python_tag|>{"name": "f", "parameters": {"a": 1}}', "", F),
    ("llama3_json", '{"type": "function", "name": "f", "arguments": {"a": 1}}', "", F),
    (
        "llama3_json",
        f'{{"name": "f", "parameters": {{"a": 1}}}}; {WEATHER % "parameters"}',
        "",
        TWO,
    ),
    (
        "llama3_json",
        f'{{"name": "f", "parameters": {{"a": 1}}}}\n{WEATHER % "parameters"}',
        "",
        TWO,
    ),
    ("llama3_json", 'Sure:<|python_tag|>{"name": "f", "parameters": {"a": 1}}', "Sure:", F),
    ("llama3_json", '{"name": "f", "parameters": {"a": 1}} Done; yes', " Done; yes", F),
    ("pythonic", "[f(a=1)]", "", F),
    ("pythonic", " [f( a = 1, ), get_weather(city='Köln', days=[1, 2,])]", "", TWO),
    ("pythonic", "<|python_start|>[f(a=1)]<|python_end|>", "", F),
    ("pythonic", "Hm. <|python_start|>[other.f()]<|python_end|>!", "Hm.!", [("other.f", {})]),
    ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}]', "", F),
    (
        "mistral",
        f'[TOOL_CALLS][{{"name":"f","arguments":{{"a":1}}}},{WEATHER % "arguments"}]',
        "",
        TWO,
    ),
    ("mistral", 'Yes.[TOOL_CALLS]f{"a": 1}', "Yes.", F),
    ("mistral", 'x[TOOL_CALLS]f[CALL_ID]abc123def[ARGS]{"a": 1}', "x", F),
    (
        "mistral",
        '[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]get_weather[ARGS]{"city":"Köln","days":[1,2]}',
        "",
        TWO,
    ),
]


@pytest.mark.parametrize(("dialect", "text", "content", "calls"), READ)
def test_calls_are_read(dialect: str, text: str, content: str, calls: list[Call]) -> None:
    for pieces in ([text], list(text)):
        reader = reader_of(dialect)
        delta = read(reader, pieces)
        assert (delta.content, calls_of(delta)) == (content, calls)
        assert reader.has_calls


MALFORMED = [
    ("hermes", "<tool_call>"),
    ("hermes", "a <tool_call>f(1)</tool_call>\n b"),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1}} and </tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": oops}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "arguments": [1]}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 01}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "other": {"a": 1}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "arguments": ' + '{"a":' * (MAX_DEPTH + 9)),
    ("hermes", '<tool_call>{"name": "", "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f"'),
    ("llama3_json", '{"name": "unknown", "parameters": {}}'),
    ("llama3_json", '{"title": "A story", "name": "f", "parameters": {}}'),
    ("llama3_json", 'As JSON: {"name": "f", "parameters": {}}'),
    ("llama3_json", "<|python_tag|>print(1)"),
    ("llama3_json", " {} "),
    ("pythonic", "[unknown(a=1)]"),
    ("pythonic", "[1, 2, 3]"),
    ("pythonic", "[f(a=open('x'))]"),
    ("pythonic", "[f(a=1+1)]"),
    ("pythonic", "[f(1)]"),
    ("pythonic", "[f(a=1, a=2)]"),
    ("pythonic", "[f(a=007)]"),
    ("pythonic", "[f(a={1: 2})]"),
    ("pythonic", "[f(a=f'x')]"),
    ("pythonic", "Call [f(a=1)]"),
    ("mistral", "[TOOL_CALLS]"),
    ("mistral", '[TOOL_CALLS]f["a"]'),
    ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": 5}]'),
    ("mistral", "[TOOL_CALLS] I cannot"),
]


@pytest.mark.parametrize(("dialect", "text"), MALFORMED)
def test_what_is_malformed_is_content_unchanged(dialect: str, text: str) -> None:
    for pieces in ([text], list(text)):
        reader = reader_of(dialect)
        delta = read(reader, pieces)
        assert (delta.content, delta.whole_calls()) == (text, [])
        assert not reader.has_calls


def test_after_a_malformed_call_a_good_one_is_read() -> None:
    text = '<tool_call>{"name" <tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
    delta = read(reader_of("hermes"), [text])
    assert (delta.content, calls_of(delta)) == ('<tool_call>{"name"', F)
    text = "[f(a=1), get_weather(city=Köln)]"
    delta = read(reader_of("pythonic"), [text])
    assert (delta.content, calls_of(delta)) == (", get_weather(city=Köln)]", F)


def test_a_call_that_is_cut_keeps_the_arguments_it_has() -> None:
    reader = reader_of("hermes")
    delta = read(reader, ['<tool_call>{"name": "f", "arguments": {"city": "Kö'])
    assert [(c.name, c.arguments) for c in delta.whole_calls()] == [("f", '{"city":"Kö')]
    assert delta.content == ""
    assert not reader.has_calls


def test_arguments_come_as_they_are_written() -> None:
    reader = reader_of("hermes")
    assert not reader.push('<tool_call>{"name": "f", "arguments": ')
    first = reader.push('{"city": "K')
    assert first.calls[0].name == "f"
    assert "".join(call.arguments for call in first.calls) == '{"city":"K'
    assert reader.push("öln").calls[0].arguments == "öln"
    assert reader.push("öln").calls[0].id is None


def test_at_most_one_call_where_none_may_be_parallel() -> None:
    text = '<tool_call>{"name":"f"}</tool_call><tool_call>{"name":"a-b_c"}</tool_call>'
    delta = read(reader_of("hermes", 1), [text])
    assert (delta.content, calls_of(delta)) == ("", [("f", {})])


def test_ids_are_the_dialects() -> None:
    call = read(reader_of("hermes"), ['<tool_call>{"name":"f"}</tool_call>']).whole_calls()[0]
    assert call.id is not None
    assert call.id.startswith("call_")
    call = read(reader_of("mistral"), ["[TOOL_CALLS]f{}"]).whole_calls()[0]
    assert call.id is not None
    assert len(call.id) == 9


def test_broken_strings_become_json() -> None:
    delta = read(
        reader_of("hermes"), ['<tool_call>{"name":"f","arguments":{"a":"1\n\t2"}}</tool_call>']
    )
    assert calls_of(delta) == [("f", {"a": "1\n\t2"})]
    text = r"""[f(a="it's \"\x41é\n\d\U0001F600", b=-.5, c=1., d=None, f={'x': True})]"""
    value = calls_of(read(reader_of("pythonic"), [text]))[0][1]
    assert value == {
        "a": "it's \"Aé\n\\d😀",
        "b": -0.5,
        "c": 1.0,
        "d": None,
        "f": {"x": True},
    }


# ---- properties

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.text(st.characters(exclude_categories=["Cs"]), max_size=6), inner, max_size=3
        )
    ),
    max_leaves=8,
)
arguments = st.dictionaries(st.sampled_from(["a", "city", "_x1"]), json_values, max_size=3)
calls = st.lists(st.tuples(st.sampled_from(NAMES), arguments), min_size=1, max_size=3)
cuts = st.lists(st.integers(0, 1000), max_size=12)


def write(name: str, said: list[Call], indent: int | None) -> str:
    def dumped(key: str) -> list[str]:
        return [
            json.dumps({"name": f, key: a}, indent=indent, ensure_ascii=not indent) for f, a in said
        ]

    if name == "hermes":
        return "\n".join(f"<tool_call>\n{one}\n</tool_call>" for one in dumped("arguments"))
    if name == "llama3_json":
        return "; ".join(dumped("parameters"))
    if name == "mistral":
        return "[TOOL_CALLS] [" + ", ".join(dumped("arguments")) + "]"
    return (
        "["
        + ", ".join(f"{f}({', '.join(f'{k}={v!r}' for k, v in a.items())})" for f, a in said)
        + "]"
    )


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(DIALECT_NAMES), calls, cuts, st.sampled_from([None, 2]))
def test_what_is_written_is_read_however_it_is_cut(
    name: str, said: list[Call], places: list[int], indent: int | None
) -> None:
    if name == "pythonic" and any(function == "a-b_c" for function, _ in said):
        said = [("f", a) for _, a in said]
    text = write(name, said, indent)
    whole = read(reader_of(name), [text])
    assert whole.content == ""
    assert calls_of(whole) == said
    assert plain(read(reader_of(name), cut(text, places))) == plain(whole)


FRAGMENTS = [
    *("<tool_call>", "</tool_call>", "<tool_", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", ";"),
    *('{"name": "f", ', '"arguments": {', '"parameters": {', '"a": 1', "}", "}}", "{", "[", "]"),
    *("f(", "a=", "1", "'x'", '"', "\\", ",", " ", "\n", "<", "text", ")", "<|python_start|>"),
    *("<think>", "</think>", "</thi"),
]
scrambled = st.lists(st.sampled_from(FRAGMENTS), max_size=14).map("".join)


def thinking(name: str) -> AnswerReader:
    return ThinkingReader(THINK, reader_of(name))


MAKERS: list[Callable[[], AnswerReader]] = [
    *(lambda name=name: reader_of(name) for name in DIALECT_NAMES),
    *(lambda name=name: thinking(name) for name in DIALECT_NAMES),
    RequiredReader,
    lambda: NamedReader("f"),
    lambda: ThinkingReader(THINK, PlainText(), is_open=True),
]


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(MAKERS), scrambled, cuts)
def test_any_text_is_read_the_same_however_it_is_cut(
    make: Callable[[], AnswerReader], text: str, places: list[int]
) -> None:
    first, second = make(), make()
    whole, pieces = read(first, [text]), read(second, cut(text, places))
    assert plain(pieces) == plain(whole)
    assert (first.has_calls, first.reasoning_length) == (second.has_calls, second.reasoning_length)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(DIALECT_NAMES), scrambled)
def test_calls_have_arguments_that_parse_and_without_calls_the_text_is_all_there(
    name: str, text: str
) -> None:
    reader = reader_of(name)
    delta = read(reader, [text])
    found = delta.whole_calls()
    if not found:
        assert delta.content == text
    for call in found if reader.has_calls else ():
        is_last = call is found[-1]
        try:
            assert isinstance(json.loads(call.arguments), dict)
        except ValueError:
            assert is_last, "only the last call can have been cut"


# ---- thoughts


@pytest.mark.parametrize(
    ("marks", "is_open", "text", "reasoning", "content"),
    [
        (THINK, False, "<think>\nHm.\n\nSo.\n</think>\n\nYes.\n", "Hm.\n\nSo.", "Yes.\n"),
        (THINK, True, "Hm.\n</think>\n\nYes.", "Hm.", "Yes."),
        (THINK, True, "Hm, on and on\n", "Hm, on and on", ""),
        (THINK, False, "\n<think></think>Yes.", "", "Yes."),
        (THINK, False, "  Yes <think>no</think>", "", "  Yes <think>no</think>"),
        (THINK, False, " <thi", "", " <thi"),
        (THINK, False, "", "", ""),
        (THINK, False, "<think>a</thin </think>b</think>c", "a</thin ", "b</think>c"),
        (BRACKETS, False, "[THINK]Hm.[/THINK]Yes.", "Hm.", "Yes."),
    ],
)
def test_thoughts_are_told_apart(
    marks: Any, is_open: bool, text: str, reasoning: str, content: str
) -> None:
    for pieces in ([text], list(text)):
        delta = read(ThinkingReader(marks, PlainText(), is_open=is_open), pieces)
        assert (delta.reasoning, delta.content) == (reasoning, content)


def test_thoughts_come_first_then_calls() -> None:
    thought = '<think>\nI could <tool_call>{"name":"f"}</tool_call>\n</think>\n\n'
    text = thought + '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
    for pieces in ([text], list(text)):
        reader = thinking("hermes")
        delta = read(reader, pieces)
        assert delta.reasoning == 'I could <tool_call>{"name":"f"}</tool_call>'
        assert (delta.content, calls_of(delta)) == ("", F)
        assert reader.has_calls
        assert reader.reasoning_length == text.index("</think>") + len("</think>")


# ---- where a grammar holds the answer


def test_required_and_named_answers_are_calls_alone() -> None:
    text = '[{"name":"f","parameters":{"a":1}},{"name":"get_weather","parameters":{}}]'
    for pieces in ([text], list(text)):
        required = RequiredReader()
        delta = read(required, pieces)
        assert (delta.content, calls_of(delta)) == ("", [("f", {"a": 1}), ("get_weather", {})])
        assert required.has_calls
    named = NamedReader("f")
    delta = read(named, list('{"a":{"b":[]}}'))
    assert (delta.content, calls_of(delta)) == ("", [("f", {"a": {"b": []}})])
    assert named.has_calls
    for end in range(len(text)):
        assert read(RequiredReader(), [text[:end]]).content == ""
    assert read(RequiredReader(), [text[:60]]).whole_calls()[0].arguments == '{"a":1}'
    assert read(RequiredReader(), ["No."]).content == "No."
    cut_short = NamedReader("f")
    assert read(cut_short, ['{"a":']).whole_calls()[0].arguments == '{"a":'
    assert not cut_short.has_calls


@pytest.mark.parametrize("name", DIALECT_NAMES)
def test_examples_in_instructions_are_in_the_dialect(name: str) -> None:
    dialect: Dialect = DIALECTS[name]
    text = dialect.write_call("get_weather", '{"city": "Köln"}')
    assert calls_of(read(reader_of(name), [text])) == [("get_weather", {"city": "Köln"})]
