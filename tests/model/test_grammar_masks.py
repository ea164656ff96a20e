from __future__ import annotations

import json
import random

import numpy
import pytest
import torch

from model.grammar import Grammar, Vocabulary
from model.grammar_masks import MaskFiller, apply_masks, apply_words, set_bits
from model.sampler import Sampler
from model.sampling_row import SamplingRow
from tests.model.test_grammar import BYTES, lark


def words_of(allowed: set[int], num_words: int) -> numpy.ndarray:
    words = numpy.zeros(num_words, dtype=numpy.int32)
    set_bits(words, sorted(allowed), True)
    return words


@pytest.mark.parametrize("vocabulary", [1, 31, 32, 33, 1000])
def test_exactly_the_allowed_logits_are_left(vocabulary: int) -> None:
    torch.manual_seed(vocabulary)
    logits = torch.randn(4, vocabulary)
    before, draws = logits.clone(), random.Random(vocabulary)
    allowed = [{t for t in range(vocabulary) if draws.random() < 0.4} for _ in range(2)]
    masks = [words_of(own, vocabulary // 32 + 1) for own in allowed]
    by_torch = logits.clone()
    apply_masks(logits, [3, 1], masks)
    apply_words(by_torch, [3, 1], torch.from_numpy(numpy.stack(masks)))  # as on a GPU
    assert torch.equal(by_torch, logits)
    for row, own in ((3, allowed[0]), (1, allowed[1])):
        for token in range(vocabulary):
            left = before[row, token] if token in own else -torch.inf
            assert logits[row, token] == left
    assert torch.equal(logits[[0, 2]], before[[0, 2]])


def test_bits_are_set_and_taken_back() -> None:
    words = words_of({0, 31, 32, 63}, 3)
    set_bits(words, [31, 64], False)
    set_bits(words, [95], True)
    bits = numpy.unpackbits(words.view(numpy.uint8), bitorder="little")
    assert set(numpy.flatnonzero(bits)) == {0, 32, 63, 95}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("row", [{"temperature": 0.0}, {}, {"top_k": 20}, {"top_p": 0.5}])
def test_a_masked_row_draws_what_is_allowed_and_its_neighbours_do_not_notice(
    row: dict[str, float], compiled: bool
) -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 300)
    sampler = Sampler(300, compiled=compiled)
    plain = [SamplingRow(i % 3, seed=i, **row) for i in range(30)]  # type: ignore[arg-type]
    alone = [draw.token for draw in sampler.launch(logits, plain).collect()]
    masked = [SamplingRow(i % 3, seed=i, logprobs=1, **row) for i in range(30)]  # type: ignore[arg-type]
    for one in masked[::2]:
        one.mask = words_of({7, 299}, 10)
    drawn = sampler.launch(logits, masked).collect()
    assert {draw.token for draw in drawn[::2]} <= {7, 299}
    assert [draw.token for draw in drawn[1::2]] == alone[1::2]
    raw = logits.log_softmax(-1)
    for draw, one in zip(drawn, masked, strict=True):
        assert draw.logprob is not None
        assert draw.logprob.logprob == pytest.approx(float(raw[one.logits_row, draw.token]))


def test_masks_of_many_texts_are_those_of_each_alone() -> None:
    grammar = Grammar(lark("start: /[a-m]{1,4}[n-z]{2}/"), BYTES)
    texts = [b"", b"a", b"abcd", b"abn", b"", b"mz"]
    states = [grammar.start() for _ in texts]
    for state, text in zip(states, texts, strict=True):
        state.take(list(text))
    filler = MaskFiller()
    together = filler.start(states, BYTES.num_words).wait()
    for state, words in zip(states, together, strict=True):
        alone = filler.start([state], BYTES.num_words).wait()
        assert numpy.array_equal(alone[0], words)
    filler.close()


def test_a_wide_vocabulary_masks_what_no_token_is() -> None:
    vocabulary = Vocabulary([b"a", b"b", *[b""] * 100])
    text = json.dumps(
        {"grammars": [{"lark_grammar": '%llguidance {"no_forcing": true}\nstart: /[ab]+/'}]}
    )
    filler = MaskFiller()
    words = filler.start([Grammar(text, vocabulary).start()], vocabulary.num_words).wait()
    logits = torch.zeros(1, 102)
    apply_masks(logits, [0], [words[0]])
    assert torch.isfinite(logits[0]).nonzero().flatten().tolist() == [0, 1]
    filler.close()
