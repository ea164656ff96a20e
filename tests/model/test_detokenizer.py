"""Pushed token by token, the text of the whole: nothing lost, nothing early, nothing late."""

from __future__ import annotations

import time
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.detokenizer import Detokenizer
from model.tokenizer import Tokenizer, load_tokenizer
from tests.model import tiny_tokenizers as tiny

REAL = [
    "tokenizers/llama2",
    "tokenizers/llama2/tokenizer.model",
    "tokenizers/llama3",
    "tokenizers/llama3/tokenizer.model",
    "tokenizers/qwen2.5",
    "tokenizers/smollm2",
    "tokenizers/mistral/tokenizer.model.v1",
    "tokenizers/mistral/tokenizer.model.v3",
    "tokenizers/mistral-chatml",
    "stories260K",
    "stories260K-meta",
    "llama-2-tiny-random.gguf",
]


@cache
def load(path: Path) -> Tokenizer:
    return load_tokenizer(path)


@pytest.fixture(scope="module")
def tiny_ones(tmp_path_factory: pytest.TempPathFactory) -> list[Tokenizer]:
    return [load_tokenizer(path) for _, path in tiny.every_kind(tmp_path_factory.mktemp("tiny"))]


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("sentencepiece")
    return load_tokenizer(tiny.write_folder(folder, "tokenizer.model", tiny.sentencepiece_model()))


def pushed(detokenizer: Detokenizer, ids: list[int]) -> str:
    return "".join([*map(detokenizer.push, ids), detokenizer.flush()])


def whole(tokenizer: Tokenizer, ids: list[int], skips_special: bool) -> str:
    shown = [token for token in ids if not (skips_special and tokenizer.is_special(token))]
    return b"".join(map(tokenizer.token_bytes, shown)).decode("utf-8", "replace")


def holds_for(tokenizer: Tokenizer, examples: int) -> None:
    """For any ids, those past the vocabulary and raw bytes among them."""
    byte_ids = [i for i in range(tokenizer.vocab_size) if len(tokenizer.token_bytes(i)) == 1]
    ids = st.lists(
        st.integers(0, tokenizer.vocab_size + 64)
        | st.sampled_from(byte_ids)
        | st.sampled_from(sorted(tokenizer.special_tokens.values()) or [0]),
        max_size=40,
    )
    prompt = tokenizer.encode("the sea") + tokenizer.encode("x", add_special_tokens=False)

    @settings(max_examples=examples, deadline=None)
    @given(ids, st.booleans())
    def check(ids: list[int], skips_special: bool) -> None:
        alone = Detokenizer(tokenizer, skip_special_tokens=skips_special)
        assert pushed(alone, ids) == tokenizer.decode(ids, skips_special)
        going_on = Detokenizer(tokenizer, prompt_ids=prompt, skip_special_tokens=skips_special)
        assert pushed(going_on, ids) == whole(tokenizer, ids, skips_special)

    check()


def test_any_ids_of_tiny_tokenizers_give_the_text_of_the_whole(tiny_ones: list[Tokenizer]) -> None:
    for tokenizer in tiny_ones:
        holds_for(tokenizer, 40)


@pytest.mark.parametrize("path", REAL)
def test_any_ids_of_real_tokenizers_give_the_text_of_the_whole(shared_dir: Path, path: str) -> None:
    holds_for(load(shared_dir / "models" / path), 60)


def test_an_unfinished_character_waits_and_comes_whole(sentencepiece: Tokenizer) -> None:
    first = sentencepiece.token_to_id("<0x00>")
    assert first is not None
    ids = [first + byte for byte in "😀é".encode()]
    detokenizer = Detokenizer(sentencepiece)
    assert [detokenizer.push(token) for token in ids] == ["", "", "", "😀", "", "é"]
    assert detokenizer.flush() == ""


def test_broken_bytes_do_not_spoil_their_neighbours(sentencepiece: Tokenizer) -> None:
    first = sentencepiece.token_to_id("<0x00>")
    assert first is not None
    ids = [first + byte for byte in b"\xe2\x82" + b"ok" + b"\xff" + "é".encode() + b"\xf0\x9f"]
    assert pushed(Detokenizer(sentencepiece), ids) == "\ufffdok\ufffdé\ufffd"


def test_a_continuation_keeps_its_leading_space_and_a_text_from_bos_drops_it(
    sentencepiece: Tokenizer,
) -> None:
    ids = sentencepiece.encode("the sea", add_special_tokens=False)
    assert sentencepiece.bos_id is not None
    assert pushed(Detokenizer(sentencepiece), ids) == "the sea"
    assert pushed(Detokenizer(sentencepiece, prompt_ids=[sentencepiece.bos_id]), ids) == "the sea"
    prompt = sentencepiece.encode("A llama sees")
    assert pushed(Detokenizer(sentencepiece, prompt_ids=prompt), ids) == " the sea"


def test_only_the_added_space_is_dropped(sentencepiece: Tokenizer) -> None:
    text = "   three spaces"
    assert sentencepiece.decode(sentencepiece.encode(text)) == text
    byte_space = sentencepiece.token_to_id("<0x20>")
    assert byte_space is not None
    assert sentencepiece.decode([byte_space]) == " "


def test_special_tokens_show_as_their_text_only_when_asked(sentencepiece: Tokenizer) -> None:
    ids = [1, *sentencepiece.encode("the", add_special_tokens=False), 2, 2]
    assert pushed(Detokenizer(sentencepiece), ids) == "the"
    shown = Detokenizer(sentencepiece, skip_special_tokens=False)
    assert pushed(shown, ids) == "<s>the</s></s>"


def test_a_push_costs_the_same_however_long_the_text(sentencepiece: Tokenizer) -> None:
    ids = sentencepiece.encode("the river runs down to the sea") * 4000
    detokenizer = Detokenizer(sentencepiece)
    half = len(ids) // 2
    laps = [time.thread_time()]
    for part in (ids[:half], ids[half:]):
        for token in part:
            detokenizer.push(token)
        laps.append(time.thread_time())
    assert laps[2] - laps[1] < 3 * (laps[1] - laps[0]) + 0.05


def test_some_special_tokens_can_be_shown_where_others_are_skipped(shared_dir: Path) -> None:
    tokenizer = load(shared_dir / "models" / "tokenizers/llama3")
    tag, end = tokenizer.special_tokens["<|python_tag|>"], tokenizer.special_tokens["<|eot_id|>"]
    ids = [end, tag, *tokenizer.encode("f()", add_special_tokens=False), end]
    assert pushed(Detokenizer(tokenizer, shown_special={tag}), ids) == "<|python_tag|>f()"
