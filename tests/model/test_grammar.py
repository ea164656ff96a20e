from __future__ import annotations

import json
import random
import re
from pathlib import Path

import numpy
import pytest

from model.detokenizer import Detokenizer
from model.grammar import Grammar, GrammarError, GrammarState, Vocabulary, cleaned
from model.tokenizer import Tokenizer, load_tokenizer
from tests.model.tiny_tokenizers import every_kind

KINDS = (
    *("sentencepiece", "unigram", "symbols", "newer", "byte-level", "metaspace", "tiktoken"),
    *("gguf-llama", "gguf-gpt2"),
)
TEXT = '{"näme": "a  cat 猫",\n"x":</s> 12}'
BYTES = Vocabulary([bytes([byte]) for byte in range(256)])


def lark(rules: str) -> str:
    header = '%llguidance {"no_forcing": true}\n'
    return json.dumps({"grammars": [{"lark_grammar": header + rules}]})


def exactly(text: str) -> str:
    return lark("start: " + json.dumps(text, ensure_ascii=False))


def mask_of(state: GrammarState, vocabulary: Vocabulary) -> set[int]:
    """What may come next, the end of our own included."""
    words = state.matcher.compute_bitmask() if state.num_taken else state.first
    bits = numpy.unpackbits(numpy.frombuffer(words, dtype="uint8"), bitorder="little")
    return {int(token) for token in numpy.flatnonzero(bits) if token <= vocabulary.end}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    return {kind: load_tokenizer(path) for kind, path in every_kind(folder)}


@pytest.mark.parametrize("kind", KINDS)
def test_every_spelling_of_a_text_is_allowed_and_nothing_else(
    tokenizers: dict[str, Tokenizer], kind: str
) -> None:
    """Logits are wider than the vocabulary; the prompt is text, so its spaces are the text's."""
    tokenizer = tokenizers[kind]
    width = tokenizer.vocab_size + 37
    vocabulary = Vocabulary.of(tokenizer, width)
    prompt = tokenizer.encode("Once upon")
    draws = random.Random(kind)
    for _ in range(3):
        state = Grammar(exactly(TEXT), vocabulary).start(prompt)
        detokenizer, said, rest = Detokenizer(tokenizer, prompt_ids=prompt), "", TEXT.encode()
        while rest:
            expected = {
                token
                for token in range(width)
                if (own := tokenizer.token_bytes(token))
                and not tokenizer.is_special(token)
                and rest.startswith(own)
            }
            assert mask_of(state, vocabulary) == expected
            assert not state.is_complete
            token = draws.choice(sorted(expected))
            state.take([token])
            rest = rest[len(tokenizer.token_bytes(token)) :]
            said += detokenizer.push(token)
        assert said == TEXT
        assert state.is_complete
        assert state.may_end


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_with_nothing_before_it_is_spelled_without_the_space_that_is_dropped(
    tokenizers: dict[str, Tokenizer], kind: str
) -> None:
    tokenizer = tokenizers[kind]
    vocabulary = Vocabulary.of(tokenizer, tokenizer.vocab_size)
    assert tokenizer.bos_id is not None or not tokenizer.drops_first_space
    prompt = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    state = Grammar(lark("start: / ?the old man/"), vocabulary).start(prompt)
    for token in mask_of(state, vocabulary):
        detokenizer = Detokenizer(tokenizer, prompt_ids=prompt)
        assert detokenizer.push(token) == tokenizer.token_bytes(token).decode()


def test_what_the_grammar_allows_is_found_by_trying_every_token() -> None:
    """Against ``re``: the beginning of a pattern of bounded length, character by character."""
    pieces = [bytes([byte]) for byte in range(128)] + [
        b"ab",
        b"ba",
        b"a-",
        b"-1",
        b"12",
        b"",
        b"<s>",
    ]
    vocabulary = Vocabulary(pieces, special=[len(pieces) - 1])
    begins = re.compile(r"(?:[ab]{1,3}(?:-(?:[0-9]{1,2})?)?)?")
    whole = re.compile(r"[ab]{1,3}-[0-9]{1,2}")
    grammar = Grammar(lark("start: /[ab]{1,3}-[0-9]{1,2}/"), vocabulary)
    for seed in range(20):
        draws, state, said = random.Random(seed), grammar.start(), b""
        while not state.is_complete:
            allowed = mask_of(state, vocabulary)
            assert (vocabulary.end in allowed) == bool(whole.fullmatch(said.decode()))
            assert allowed - {vocabulary.end} == {
                token
                for token, piece in enumerate(pieces[:-1])
                if piece and begins.fullmatch((said + piece).decode())
            }
            token = draws.choice(sorted(allowed - {vocabulary.end}))
            state.take([token])
            said += pieces[token]
        assert whole.fullmatch(said.decode())


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        ("start: /(/", "unclosed group"),
        ("start: foo", 'unknown name: "foo"'),
        ("start: /[^\\s\\S]/", "no text satisfies it"),
        ('start: ""', "nothing but the empty text"),
        ('start: %json {"type": "strin"}', "Invalid type: strin"),
        ('start: %json {"$ref": "file:///etc/passwd"}', "Default retriever does not fetch"),
        ("start: /猫/", "none that this model's tokens can spell"),
    ],
)
def test_a_bad_grammar_is_told_in_one_line(grammar: str, message: str) -> None:
    ascii_only = Vocabulary([bytes([byte]) for byte in range(128)])
    with pytest.raises(GrammarError) as caught:
        Grammar(lark(grammar), ascii_only)
    told = str(caught.value)
    assert message in told
    assert "\n" not in told
    assert "%llguidance" not in told


def test_a_message_is_cut_and_shows_no_listing() -> None:
    assert cleaned("at 2(8): failed to compile JSON schema: bad\n   1 | start\n     ^\n") == "bad"
    assert len(cleaned("x" * 1000)) < 310


def test_a_state_that_is_told_what_it_does_not_allow_says_so() -> None:
    state = Grammar(exactly("ab"), BYTES).start()
    assert state.can_take(ord("a"))
    assert not state.can_take(ord("b"))
    with pytest.raises(GrammarError):
        state.take([ord("b")])


def test_texts_of_one_grammar_do_not_know_each_other() -> None:
    grammar = Grammar(lark('start: "ab" | "cd"'), BYTES)
    first, second = grammar.start(), grammar.start()
    first.take([ord("a")])
    second.take([ord("c")])
    assert mask_of(first, BYTES) == {ord("b")}
    assert mask_of(second, BYTES) == {ord("d")}


def test_a_vocabulary_of_many_words_has_its_end_behind_the_last_token(tmp_path: Path) -> None:
    for size in (31, 32, 33, 64):
        vocabulary = Vocabulary([b"a", *(b"b%d" % i for i in range(size - 1))])
        assert vocabulary.num_words == size // 32 + 1
        state = Grammar(lark("start: /a+/"), vocabulary).start()
        state.take([0])
        assert mask_of(state, vocabulary) == {0, size}
