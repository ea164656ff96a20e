"""Prompts whose states are pooled, or scored from somewhere on: each token once."""

from __future__ import annotations

import random

import pytest

from service.engine.blocks import BlockPool
from service.engine.messages import SamplingSettings, Submit
from tests.engine.storm import Storm

NOTHING = SamplingSettings(max_tokens=0)


def question(number: int, rng: random.Random) -> Submit:
    """Many begin alike, so that most of them could be read from the cache."""
    prompt = [1] * rng.randint(1, 40) + [2 + number % 3] * rng.randint(0, 30)
    kind = number % 3
    if kind == 2:
        first = rng.randint(1, len(prompt))
        return Submit(number, prompt, [NOTHING], prompt_logprobs=0, logprobs_from=first)
    return Submit(number, prompt, [NOTHING], pooling=("mean", "last")[kind])


@pytest.mark.parametrize("ahead", [False, True], ids=["in_turn", "ahead"])
@pytest.mark.parametrize("seed", range(8))
def test_every_token_is_pooled_once(ahead: bool, seed: int) -> None:
    rng = random.Random(seed)
    pool = BlockPool(22, 8, grain=4)
    storm = Storm(pool, max_num_seqs=6, budget=12, ahead=ahead)
    for number in range(60):
        storm.submit(question(number, rng))
        if number % 6 == 0:  # an answer that grows, goes first and takes pages from the others
            one = SamplingSettings(max_tokens=60, seed=number)
            storm.submit(Submit(1000 + number, [5] * 15, [one], priority=-1))
        storm.run(rng.randint(0, 4))
        storm.check()
    storm.end()
    assert storm.scheduler.counters.preemptions
    assert storm.scheduler.counters.prefix_hits


def test_what_is_not_scored_is_read_from_the_cache() -> None:
    storm = Storm(BlockPool(40, 8, grain=4), budget=16)
    prompt = list(range(40))
    for number, first in enumerate((1, 1, 21, 40)):
        submit = Submit(number, prompt, [NOTHING], prompt_logprobs=0, logprobs_from=first)
        storm.submit(submit)
        storm.end()
        cached = storm.answers[0, number].outputs[0].cached_tokens
        assert cached == (0 if number < 2 else 20 if first == 21 else 39)


def test_a_mean_reads_nothing_and_leaves_its_pages_to_others() -> None:
    storm = Storm(BlockPool(40, 8, grain=4), budget=16)
    for number, pooling in enumerate(("mean", "mean", "last")):
        storm.submit(Submit(number, list(range(40)), [NOTHING], pooling=pooling))
        storm.end()
        cached = storm.answers[0, number].outputs[0].cached_tokens
        assert cached == (39 if pooling == "last" else 0)
    assert storm.scheduler.counters.prefix_queries == 40
