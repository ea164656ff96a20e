"""Prompts, lengths and arrivals come from the seed and from nothing else."""

from __future__ import annotations

import itertools
from statistics import mean

import pytest

from service.bench.problem import BenchProblem
from service.bench.workload import Lengths, Workload, poisson_arrivals


def test_lengths_are_a_number_or_a_range() -> None:
    assert Lengths.parse("128") == Lengths(128, 128)
    assert Lengths.parse("64:512") == Lengths(64, 512)
    assert str(Lengths.parse("64:512")) == "64:512"


@pytest.mark.parametrize("text", ["", "0", "-3", "a", "5:", "9:3", "1:2:3", "1.5"])
def test_what_is_no_length_is_refused(text: str) -> None:
    with pytest.raises(BenchProblem, match="no length"):
        Lengths.parse(text)


def test_the_same_seed_draws_the_same_and_another_does_not() -> None:
    workload = Workload(Lengths(8, 40), Lengths(1, 9), seed=3)
    assert workload.jobs(20) == workload.jobs(20)
    assert workload.jobs(20) != Workload(Lengths(8, 40), Lengths(1, 9), seed=4).jobs(20)
    assert workload.jobs(20) != workload.jobs(20, stream=1)


def test_lengths_and_ids_stay_within_their_bounds() -> None:
    jobs = Workload(Lengths(8, 12), Lengths(3, 5), vocabulary=1000).jobs(200)
    assert {len(job.prompt) for job in jobs} == {8, 9, 10, 11, 12}
    assert {job.output_len for job in jobs} == {3, 4, 5}
    ids = {token for job in jobs for token in job.prompt}
    assert min(ids) >= 300
    assert max(ids) < 1000


def test_a_small_vocabulary_still_gives_ids() -> None:
    jobs = Workload(Lengths(50, 50), vocabulary=10).jobs(3)
    assert {token for job in jobs for token in job.prompt} <= set(range(5, 10))


@pytest.mark.parametrize("prompt_format", ["ids", "text"])
def test_a_shared_prefix_begins_every_prompt_and_nothing_else_is_shared(prompt_format: str) -> None:
    workload = Workload(Lengths(40, 40), shared_prefix=30, prompt_format=prompt_format)
    prompts = [words(job.prompt) for job in workload.jobs(6)]
    assert len({tuple(prompt[:30]) for prompt in prompts}) == 1
    assert len({tuple(prompt[30:]) for prompt in prompts}) == 6
    assert all(len(prompt) == 40 for prompt in prompts)
    assert words(workload.jobs(1, stream=1)[0].prompt)[:30] != prompts[0][:30]


def words(prompt: list[int] | str) -> list[int] | list[str]:
    return prompt.split() if isinstance(prompt, str) else prompt


def test_a_prefix_as_long_as_the_prompt_is_refused() -> None:
    with pytest.raises(BenchProblem, match="shared prefix"):
        Workload(Lengths(30, 60), shared_prefix=30).jobs(1)


def test_text_follows_the_words_a_token_takes() -> None:
    workload = Workload(Lengths(100, 100), prompt_format="text", words_per_token=0.5)
    assert len(words(workload.jobs(1)[0].prompt)) == 50


def test_arrivals_are_poisson_and_come_from_the_seed() -> None:
    arrivals = poisson_arrivals(4.0, 4000, seed=1)
    gaps = [b - a for a, b in itertools.pairwise([0.0, *arrivals])]
    assert arrivals == poisson_arrivals(4.0, 4000, seed=1)
    assert arrivals != poisson_arrivals(4.0, 4000, seed=2)
    assert arrivals == sorted(arrivals)
    assert mean(gaps) == pytest.approx(0.25, rel=0.05)
    # exponential: the spread equals the mean, and as many lie above it as e says
    assert mean((gap - 0.25) ** 2 for gap in gaps) ** 0.5 == pytest.approx(0.25, rel=0.1)
    assert sum(gap > 0.25 for gap in gaps) / len(gaps) == pytest.approx(0.3679, abs=0.03)
