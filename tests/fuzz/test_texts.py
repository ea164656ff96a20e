"""Hostile texts: whatever is written, tokenizers, templates and readers give the same however it is
cut, and fail in no other way than their own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model.chat_template import ChatTemplate, ChatTemplateError
from model.detokenizer import Detokenizer
from model.tokenizer import TextNotEncodable, Tokenizer, load_tokenizer
from service.api.text import ChoiceText, StopStrings
from service.engine.messages import Output, SamplingSettings
from tests.api.test_readers import MAKERS, cut, plain, read
from tests.model import tiny_tokenizers as tiny
from tests.model.test_template_sandbox import ESCAPES, GROWTH, LOOPS, STRUCTURES, WIDTHS

SLOW = pytest.mark.slow
FEW = [pytest.param(60), pytest.param(5_000, marks=SLOW)]
ODD = [
    *(
        "\0",
        "\ud800",
        "\udfff",
        "\ufeff",
        "\u2028",
        "\r\n",
        "\x85",
        "e\u0301",
        "🦙",
        "👩‍👩‍👧",
        "\U0010ffff",
    ),
    *(
        "<s>",
        "</s>",
        "<unk>",
        "<0x41>",
        "<0x",
        "▁",
        "▁▁",
        " ",
        "\t\t",
        "<|im_start|>",
        "<|im_end|>",
    ),
    *("<|begin|>", "<think>", "[INST]", "<tool_call>", "a" * 500, "  " * 200, "1234567", "日本"),
]
texts = st.lists(st.sampled_from(ODD) | st.text(max_size=8), max_size=12).map("".join)


def many(examples: int) -> Callable[[Any], Any]:
    return settings(
        max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> list[Tokenizer]:
    return [load_tokenizer(path) for _, path in tiny.every_kind(tmp_path_factory.mktemp("tiny"))]


# --------------------------------------------------------------------------- tokenizers


@pytest.mark.parametrize("examples", FEW)
def test_a_text_becomes_ids_and_comes_back_or_is_refused(
    examples: int, tokenizers: list[Tokenizer]
) -> None:
    @many(examples)
    @given(st.sampled_from(tokenizers), texts, st.booleans(), st.booleans())
    def encode(tokenizer: Tokenizer, text: str, adds: bool, parses: bool) -> None:
        try:
            ids = tokenizer.encode(text, add_special_tokens=adds, parse_special=parses)
        except TextNotEncodable:
            assert any("\ud800" <= letter <= "\udfff" for letter in text)
            return
        assert all(0 <= token < tokenizer.vocab_size for token in ids)
        tokenizer.decode(ids, skip_special_tokens=False).encode()
        if not (adds or parses):
            unknown = tokenizer.token_to_id("<unk>")
            assert set(ids) & set(tokenizer.special_tokens.values()) <= {unknown}

    encode()


@pytest.mark.parametrize("examples", FEW)
def test_a_byte_level_text_comes_back_letter_for_letter(
    examples: int, tokenizers: list[Tokenizer]
) -> None:
    exact = [one for one in tokenizers if one.encode("\0é", add_special_tokens=False)]
    exact = [one for one in exact if not one.drops_first_space and one.token_to_id("Ġthe")]
    assert len(exact) >= 2

    @many(examples)
    @given(st.sampled_from(exact), texts)
    def back(tokenizer: Tokenizer, text: str) -> None:
        text = text.encode("utf-8", "ignore").decode()
        ids = tokenizer.encode(text, add_special_tokens=False, parse_special=False)
        assert tokenizer.decode(ids, skip_special_tokens=False) == text

    back()


any_id = st.integers(-(2**63), 2**64) | st.integers(0, 500)


@pytest.mark.parametrize("examples", FEW)
def test_any_numbers_at_all_are_text_that_utf_8_can_carry(
    examples: int, tokenizers: list[Tokenizer]
) -> None:
    @many(examples)
    @given(st.sampled_from(tokenizers), st.lists(any_id, max_size=30), st.booleans())
    def detokenize(tokenizer: Tokenizer, ids: list[int], skips: bool) -> None:
        detokenizer = Detokenizer(tokenizer, skip_special_tokens=skips)
        pieces = [*map(detokenizer.push, ids), detokenizer.flush()]
        assert "".join(pieces) == tokenizer.decode(ids, skips)
        for piece in pieces:
            piece.encode()  # no half of a character ever leaves

    detokenize()


@pytest.mark.parametrize("examples", FEW)
def test_stop_strings_are_found_whatever_tokens_cut_them(
    examples: int, tokenizers: list[Tokenizer]
) -> None:
    stops = st.lists(
        st.sampled_from(ODD[3:]) | st.text("ab \n<|", min_size=1, max_size=4), max_size=4
    )

    @many(examples)
    @given(st.sampled_from(tokenizers), st.lists(st.integers(0, 450), max_size=30), stops)
    def find(tokenizer: Tokenizer, ids: list[int], stops: list[str]) -> None:
        text = ChoiceText(
            0, SamplingSettings(max_tokens=100), Detokenizer(tokenizer), StopStrings(stops)
        )
        shown = ""
        for token in ids:
            shown += text.push(Output(0, 0, [token])).text
            if text.is_finished:
                break
        else:
            shown += text.push(Output(0, 0, [], finish_reason="length")).text
        whole = tokenizer_text(tokenizer, ids)
        stopped = any(stop in whole for stop in stops)
        assert text.is_finished
        assert whole.startswith(shown) if stopped else shown == whole
        assert not any(stop in shown for stop in stops)

    find()


def tokenizer_text(tokenizer: Tokenizer, ids: list[int]) -> str:
    detokenizer = Detokenizer(tokenizer)
    return "".join([*map(detokenizer.push, ids), detokenizer.flush()])


# --------------------------------------------------------------------------- chat templates


PIECES = [
    *("{{ ", " }}", "{% ", " %}", "{%- ", " -%}", "{# ", " #}", "for m in messages", "endfor"),
    *("if ", "endif", "else", "set x = ", "set ns.x = ", "macro f(a)", "endmacro", "call f(1)"),
    *("messages", "messages[0]", ".content", "['role']", "| tojson", "| trim", "| length"),
    *("| map('upper')", "| join", "| replace('a', 'aa')", "| attr('__class__')", "| format(9)"),
    *("range(99999)", "* 99999", "+ x", "~ x", "[x, x]", "{'a': x}", "namespace(x=1)", "loop"),
    *(
        ".__class__",
        ".__mro__",
        "[1:2]",
        "**",
        "%",
        "is string",
        "in",
        "recursive",
        "self",
        "caller()",
    ),
    *("raise_exception('no')", "strftime_now('%Y')", "tools", "kwargs", "'a'", "1", "(", ")", " "),
]
sources = st.lists(st.sampled_from(PIECES), max_size=14).map("".join)
HOSTILE = [*LOOPS, *GROWTH, *WIDTHS, *STRUCTURES, *ESCAPES]
spliced = st.tuples(st.sampled_from(HOSTILE), st.sampled_from(HOSTILE), st.integers(0, 200)).map(
    lambda parts: parts[0][: parts[2]] + parts[1] + parts[0][parts[2] :]
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
messages = st.lists(
    st.dictionaries(
        st.sampled_from(["role", "content", "tool_calls", "name", "x"]), json_values, max_size=4
    ),
    max_size=4,
)


@pytest.mark.parametrize("examples", [pytest.param(40), pytest.param(3_000, marks=SLOW)])
def test_any_template_over_any_messages_ends_soon_and_reaches_nothing(
    examples: int, tokenizers: list[Tokenizer]
) -> None:
    @many(examples)
    @given(st.sampled_from(tokenizers), sources | spliced, messages)
    def run(tokenizer: Tokenizer, source: str, messages: list[Mapping[str, Any]]) -> None:
        begun = time.thread_time()
        try:
            segments = ChatTemplate(source, tokenizer).render(messages)
        except ChatTemplateError as error:
            said = str(error)
        else:
            said = "".join(segment.text for segment in segments)
        assert time.thread_time() - begun < 10
        assert len(said) < 20_000_000
        assert "<class '" not in said
        assert "<function" not in said
        assert "<module" not in said

    run()


@pytest.mark.parametrize("examples", FEW)
def test_what_messages_say_never_becomes_a_special_token(
    examples: int, tokenizers: list[Tokenizer]
) -> None:
    source = "{% for m in messages %}{{ m.role }}{{ m.content | string | trim }}{% endfor %}"
    templates = [ChatTemplate(source, tokenizer) for tokenizer in tokenizers]

    @many(examples)
    @given(st.sampled_from(range(len(templates))), messages)
    def encode(number: int, messages: list[Mapping[str, Any]]) -> None:
        try:
            segments = templates[number].render(messages)
            templates[number].encode(messages)
        except (ChatTemplateError, TextNotEncodable):
            return
        assert not any(segment.is_special for segment in segments)

    encode()


# --------------------------------------------------------------------------- tool calls


MARKUP = [
    *(
        "<tool_call>",
        "</tool_call>",
        "[TOOL_CALLS]",
        "[ARGS]",
        "<|python_tag|>",
        "<think>",
        "</think>",
    ),
    *(
        '{"name": "f", "arguments": ',
        '{"a": 1}',
        "f(a=",
        "[f(",
        ")]",
        "]",
        "}",
        "'",
        '"',
        "\\u",
        "\\",
    ),
    *(
        "\\ud83e",
        "\\udd99",
        "1e999",
        "-0",
        "NaN",
        "None",
        "True",
        '{"a":' * 60,
        "[" * 60,
        "\\x4",
        "b''",
    ),
]
marked = st.lists(st.sampled_from(MARKUP) | st.sampled_from(ODD) | st.text(max_size=6), max_size=12)
cuts = st.lists(st.integers(0, 3000), max_size=10)


@pytest.mark.parametrize("examples", [pytest.param(200), pytest.param(20_000, marks=SLOW)])
def test_readers_take_any_text_cut_anywhere(examples: int) -> None:
    @many(examples)
    @given(st.sampled_from(MAKERS), marked.map("".join), cuts)
    def check(make: Any, text: str, places: list[int]) -> None:
        text = text.encode("utf-8", "replace").decode()  # as a detokenizer gives it
        first, second = make(), make()
        whole, pieces = read(first, [text]), read(second, cut(text, places))
        assert plain(pieces) == plain(whole)
        assert first.has_calls == second.has_calls

    check()


def test_a_file_of_the_machine_is_no_template(tokenizers: list[Tokenizer], tmp_path: Path) -> None:
    (tmp_path / "canary").write_text("it was read")
    for source in (
        f"{{% include '{tmp_path}/canary' %}}",
        f"{{% set x = '{tmp_path}/canary' %}}{{{{ open(x).read() }}}}",
        f"{{{{ cycler.__init__.__globals__.os.popen('cat {tmp_path}/canary').read() }}}}",
    ):
        with pytest.raises(ChatTemplateError) as caught:
            ChatTemplate(source, tokenizers[0]).render([{"role": "user", "content": "x"}])
        assert "it was read" not in str(caught.value)
