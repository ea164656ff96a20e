"""The sampler's promises: right distributions, and draws no neighbour can change."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model import sampler as sampler_module
from model.drawing import DrawSettings, draw_by_rank
from model.flat_rows import draw_flat_rows
from model.kernels import kernel_status
from model.kernels.sampling import rows_kernel
from model.largest import argmax, largest
from model.logprobs import prompt_logprobs
from model.penalties import PenaltyState, adjust
from model.random_draws import uniform
from model.sampler import Sampler
from model.sampling_row import Draw, DrawError, SamplingRow

VOCAB = 1_000


@pytest.fixture(autouse=True, params=["tensors", "compiled"], scope="module")
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """Everything here holds for both ways to draw."""
    if request.param == "compiled" and rows_kernel(VOCAB, 1) is None:
        pytest.skip(f"no kernels here: {kernel_status()[1]}")
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "tensors":
            patch.setattr(sampler_module, "rows_kernel", lambda *_: None)
        yield request.param


def logits_of(num_rows: int, vocab: int = VOCAB, *, seed: int = 0, spread: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, vocab, generator=generator) * spread


def draw(logits: Tensor, rows: list[SamplingRow]) -> list[Draw]:
    return Sampler(logits.size(1)).launch(logits, rows).collect()


def tokens(logits: Tensor, rows: list[SamplingRow]) -> list[int]:
    return [each.token for each in draw(logits, rows)]


def assert_frequencies(drawn: list[int], probabilities: Tensor) -> None:
    """Chi-square over the tokens expected five times or more; the rest pooled; 5 sigma."""
    expected = probabilities.double() * len(drawn)
    observed = torch.bincount(torch.tensor(drawn), minlength=expected.numel()).double()
    assert (observed[expected == 0] == 0).all(), "a token of probability zero was drawn"
    often = expected >= 5
    statistic = ((observed - expected)[often] ** 2 / expected[often]).sum().item()
    rare_expected, rare_observed = expected[~often].sum().item(), observed[~often].sum().item()
    freedom = int(often.sum()) - 1
    if rare_expected >= 5:
        statistic += (rare_observed - rare_expected) ** 2 / rare_expected
        freedom += 1
    assert statistic < freedom + 5 * math.sqrt(2 * max(freedom, 1)), (statistic, freedom)


def many(row: SamplingRow, count: int) -> list[SamplingRow]:
    return [replace(row, position=position) for position in range(count)]


# ---- uniforms ----------------------------------------------------------------------------------


def test_uniforms_are_these_numbers_for_ever() -> None:
    """A seeded answer must survive releases: changing these is changing everybody's texts."""
    assert uniform(0, 0, 0) == 0.13870941014555171
    assert uniform(42, 1, 1000) == 0.27303367600201867
    assert uniform(-(2**63), 127, 131_071) == 0.33134897111997574


@pytest.mark.parametrize("coordinate", [0, 1, 2])
def test_uniforms_are_uniform_along_each_coordinate(coordinate: int) -> None:
    triples = [[7, 3, 11] for _ in range(20_000)]
    for value, triple in enumerate(triples):
        triple[coordinate] = value
    numbers = [uniform(*triple) for triple in triples]
    assert_frequencies([int(number * 64) for number in numbers], torch.full((64,), 1 / 64))
    pairs = [int(a * 8) * 8 + int(b * 8) for a, b in itertools.pairwise(numbers)]
    assert_frequencies(pairs[::2], torch.full((64,), 1 / 64))


# ---- the order of logits -----------------------------------------------------------------------


@pytest.mark.parametrize("vocab", [10, 64, 65, 1_000, 4_096, 20_001])
@pytest.mark.parametrize("levels", [3, 50, None])
def test_largest_entries_are_those_of_a_full_stable_sort(vocab: int, levels: int | None) -> None:
    logits = logits_of(5, vocab)
    if levels is not None:
        logits = (logits * levels / 10).round()
    values, ids = torch.sort(logits, descending=True, stable=True)
    for k in (1, 20, 64, 256):
        found, found_ids = largest(logits, min(k, vocab))
        assert torch.equal(found, values[:, :k])
        certain = found > found[:, -1:]
        assert torch.equal(found_ids[certain], ids[:, :k][certain])
        assert all(len(set(row)) == len(row) for row in found_ids.tolist())


@pytest.mark.parametrize("vocab", [10, 64, 65, 1_000, 20_001])
def test_greedy_takes_the_smallest_id_among_equals(vocab: int) -> None:
    logits = logits_of(50, vocab).round().clamp(max=4)
    values, ids = argmax(logits)
    assert torch.equal(values, logits.amax(-1))
    assert ids.tolist() == [(row == row.max()).nonzero()[0].item() for row in logits]


# ---- distributions -----------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", [7, 300])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_unfiltered_draws_follow_the_softmax(vocab: int, temperature: float) -> None:
    logits = logits_of(1, vocab)
    drawn = tokens(logits, many(SamplingRow(0, seed=5, temperature=temperature), 20_000))
    assert_frequencies(drawn, torch.softmax(logits[0] / temperature, dim=-1))


@pytest.mark.parametrize(
    "row",
    [
        SamplingRow(0, top_k=12, seed=1),
        SamplingRow(0, top_p=0.8, seed=2),
        SamplingRow(0, min_p=0.05, seed=3),
        SamplingRow(0, top_k=30, top_p=0.7, temperature=1.4, seed=4),
        SamplingRow(0, top_p=0.99, temperature=2.0, seed=5),
    ],
)
def test_filtered_draws_follow_the_warpers_of_transformers(row: SamplingRow) -> None:
    logits = logits_of(1, 2_000)
    drawn = tokens(logits, many(row, 10_000))
    assert_frequencies(drawn, torch.softmax(warped(logits, row)[0], dim=-1))


def warped(logits: Tensor, row: SamplingRow) -> Tensor:
    """What transformers leaves of the logits for one kind of filter, or top-k and then top-p."""
    process = pytest.importorskip("transformers.generation.logits_process")
    ids = torch.zeros(logits.size(0), 1, dtype=torch.int64)
    logits = process.TemperatureLogitsWarper(float(row.temperature))(ids, logits)
    if row.top_k:
        logits = process.TopKLogitsWarper(row.top_k)(ids, logits)
    if row.top_p < 1:
        logits = process.TopPLogitsWarper(row.top_p)(ids, logits)
    if row.min_p:
        logits = process.MinPLogitsWarper(row.min_p)(ids, logits)
    return logits


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    vocab=st.integers(2, 700),
    temperature=st.floats(0.2, 2.0),
    top_k=st.sampled_from([0, 1, 5, 50, 100]),
    top_p=st.sampled_from([1.0, 0.99, 0.9, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.01, 0.3]),
)
def test_kept_tokens_and_their_shares_are_those_of_transformers(
    seed: int, vocab: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    """A sweep of uniforms meets each kept token as often as its share says, to one step."""
    if top_p < 1 and min_p > 0:
        top_p = 1.0  # taken in another order there (min-p last)
    row = SamplingRow(0, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    logits = logits_of(1, vocab, seed=seed)
    steps = 2_000
    sweep = [replace(row.draw_settings(vocab), uniform=(i + 0.5) / steps) for i in range(steps)]
    drawn = draw_by_rank(logits.expand(steps, vocab), sweep, vocab)[:, 0].long()
    expected = torch.softmax(warped(logits, row)[0], dim=-1) * steps
    counts = torch.bincount(drawn, minlength=vocab)
    assert (counts[expected == 0] == 0).all()
    assert ((counts - expected).abs() < 1.01).all()


def test_min_p_comes_before_top_p_as_in_vllm() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    row = SamplingRow(0, min_p=0.5, top_p=0.6)  # min-p leaves .5 and .3, of which .5 is 62.5 %
    assert set(tokens(logits, many(row, 500))) == {0}
    assert set(tokens(logits, many(replace(row, top_p=0.65), 500))) == {0, 1}


def test_exactly_k_are_kept_among_equals() -> None:
    logits = torch.zeros(1, 500)
    assert set(tokens(logits, many(SamplingRow(0, top_k=3), 400))) == {0, 1, 2}


# ---- independence ------------------------------------------------------------------------------

ROWS = st.builds(
    SamplingRow,
    logits_row=st.integers(0, 7),
    seed=st.integers(-(2**63), 2**63 - 1),
    choice=st.integers(0, 127),
    position=st.integers(0, 200_000),
    temperature=st.sampled_from([0.0, 1e-6, 1e-5, 0.1, 0.7, 1.0, 2.0]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.3]),
    top_k=st.sampled_from([-1, 0, 1, 40, 64, 300, 5_000]),
    min_p=st.sampled_from([0.0, 0.0, 1e-4, 0.2, 1.0]),
    presence_penalty=st.sampled_from([0.0, 1.5]),
    frequency_penalty=st.sampled_from([0.0, -0.5]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    logit_bias=st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-100, 100), max_size=3),
    allowed=st.none() | st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20),
    banned=st.lists(st.integers(0, VOCAB - 1), max_size=3),
    prompt=st.lists(st.integers(0, VOCAB - 1), max_size=5),
    output=st.lists(st.integers(0, VOCAB - 1), max_size=5),
    logprobs=st.sampled_from([None, 0, 3, 20]),
)


@settings(max_examples=80, deadline=None)
@given(rows=st.lists(ROWS, min_size=1, max_size=12), levels=st.sampled_from([None, 2.0, 0.0]))
def test_a_row_draws_the_same_alone_and_in_any_batch(
    rows: list[SamplingRow], levels: float | None
) -> None:
    """``levels`` rounds the logits, so that nearly all (or all) of them are ties."""
    logits = logits_of(8) if levels is None else (logits_of(8) * levels / 3).round()
    together = draw(logits, rows)
    backwards = draw(logits, rows[::-1])[::-1]
    alone = [
        draw(logits[row.logits_row : row.logits_row + 1].clone(), [replace(row, logits_row=0)])[0]
        for row in rows
    ]
    # Neighbours may be why a draw was settled late, but never what it is.
    together, backwards, alone = (
        [replace(one, is_late=False) for one in drawn] for drawn in (together, backwards, alone)
    )
    assert together == backwards == alone


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1_000),
    spread=st.sampled_from([0.0, 0.01, 1.0, 4.0]),
    levels=st.sampled_from([None, 1.0, 20.0]),
    row=st.builds(
        SamplingRow,
        logits_row=st.just(0),
        temperature=st.sampled_from([1e-5, 0.3, 1.0, 2.0]),
        top_p=st.sampled_from([1.0, 0.99999, 0.9, 0.2, 1e-9]),
        top_k=st.sampled_from([0, 1, 40, 63, 64, 256, 3_000]),
        min_p=st.sampled_from([0.0, 0.02, 0.5]),
    ),
)
def test_few_candidates_when_certain_and_buckets_always_draw_what_a_sort_draws(
    seed: int, spread: float, levels: float | None, row: SamplingRow
) -> None:
    logits = logits_of(40, 9_000, seed=seed, spread=spread)
    if levels is not None:
        logits = (logits * levels).round() / levels
    rows = [replace(row.draw_settings(9_000), uniform=uniform(seed, i, 0)) for i in range(40)]
    complete = draw_by_rank(logits, rows, 9_000)
    assert torch.equal(draw_flat_rows(logits, rows), complete)
    for num_candidates in (64, 256, 8_192):
        few = draw_by_rank(logits, rows, num_candidates)
        certain = few[:, 2] > 0
        assert torch.equal(few[certain, 0], complete[certain, 0])


def test_usual_settings_on_peaked_logits_need_no_second_try() -> None:
    logits = logits_of(32, 32_000, spread=4.0)
    usual = SamplingRow(0, temperature=0.6, top_p=0.9).draw_settings(32_000)
    assert (draw_by_rank(logits, [usual] * 32, 256)[:, 2] > 0).all()


def test_the_callers_logits_are_never_changed() -> None:
    logits = logits_of(3)
    before = logits.clone()
    draw(logits, [SamplingRow(i, logit_bias={1: 5.0}, banned=[2], temperature=0) for i in range(3)])
    assert torch.equal(logits, before)


def test_choices_that_share_one_row_of_logits_draw_from_their_own_settings() -> None:
    logits = logits_of(1)
    rows = [SamplingRow(0, seed=9, choice=i, banned=[i]) for i in range(40)]
    drawn = tokens(logits, rows)
    assert len(set(drawn)) > 5
    assert drawn == [tokens(logits, [row])[0] for row in rows]


# ---- temperature -------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1e-38, 1e-6, 1e-5, 1e-4])
def test_tiny_temperatures_draw_the_largest_logit(temperature: float) -> None:
    logits = logits_of(20, spread=1_000.0)
    for row in (SamplingRow(0), SamplingRow(0, top_p=0.9), SamplingRow(0, top_k=5)):
        rows = [replace(row, logits_row=i, temperature=temperature) for i in range(20)]
        assert tokens(logits, rows) == logits.argmax(-1).tolist()


# ---- penalties, bias, allowed and banned -------------------------------------------------------


def test_adjustments_are_vllms_written_out_densely() -> None:
    logits = logits_of(1)[0]
    row = SamplingRow(
        0,
        logit_bias={5: 3.0, 6: -100.0},
        repetition_penalty=1.7,
        frequency_penalty=0.4,
        presence_penalty=-0.3,
        prompt=[1, 2, 2, 5],
        output=[2, 3, 3, 6],
        banned=[9],
    )
    expected = logits.clone()
    expected[5] += 3
    expected[6] -= 100
    for token in {1, 2, 5, 3, 6}:
        value = expected[token]
        expected[token] = value / 1.7 if value > 0 else value * 1.7
    for token, count in {2: 1, 3: 2, 6: 1}.items():
        expected[token] -= 0.4 * count - 0.3
    expected[9] = -math.inf
    adjusted = logits.unsqueeze(0).clone()
    adjust(adjusted, [row])
    torch.testing.assert_close(adjusted[0], expected)


def test_repetition_penalty_equals_that_of_transformers() -> None:
    process = pytest.importorskip("transformers.generation.logits_process")
    logits = logits_of(1)
    prompt, output = [3, 4, 5, 3], [700, 4, 8]
    expected = process.RepetitionPenaltyLogitsProcessor(1.3)(
        torch.tensor([prompt + output]), logits.clone()
    )
    adjust(logits, [SamplingRow(0, repetition_penalty=1.3, prompt=prompt, output=output)])
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("penalty", [1e-308, 1e-30, 1e30, 1e308])
def test_the_strongest_repetition_penalties_leave_finite_logits(penalty: float) -> None:
    logits = torch.tensor([[-5.0, 0.0, 30.0, 1.0]])
    adjust(logits, [SamplingRow(0, repetition_penalty=penalty, prompt=[0, 1, 2, 3])])
    assert logits.isfinite().all()


@given(st.lists(st.integers(0, 40), max_size=60), st.integers(0, 20), st.booleans())
def test_penalties_kept_from_step_to_step_equal_those_counted_afresh(
    sequence: list[int], num_prompt: int, count_prompt: bool
) -> None:
    prompt = sequence[:num_prompt]
    kept = PenaltyState(prompt, count_prompt=count_prompt)
    for end in range(len(prompt), len(sequence) + 1):
        kept.catch_up(sequence[:end])
    seen = dict(zip(kept.ids.tolist(), kept.counts.tolist(), strict=True))
    output = sequence[len(prompt) :]
    expected = {token: output.count(token) for token in (sequence if count_prompt else output)}
    assert seen == expected


def test_a_kept_penalty_state_is_used_instead_of_prompt_and_output() -> None:
    logits = torch.tensor([[2.0, 1.9, 1.0]])
    state = PenaltyState([0])
    row = SamplingRow(0, temperature=0, repetition_penalty=2.0, penalties=state)
    assert tokens(logits, [row]) == [1]
    state.catch_up([0, 1])
    assert tokens(logits, [row]) == [0]  # 1.0 against 0.95 and 1.0: the smaller id


def test_allowed_wins_over_bias_and_banned_wins_over_allowed() -> None:
    logits = logits_of(1)
    row = SamplingRow(0, allowed=[10, 11, 12], banned=[11], logit_bias={3: 100.0})
    assert set(tokens(logits, many(replace(row, logit_bias={12: -100.0, 3: 100.0}), 50))) == {10}
    as_tensor = replace(row, allowed=torch.tensor([10, 11, 12]))
    assert tokens(logits, many(row, 50)) == tokens(logits, many(as_tensor, 50))


# ---- rows that cannot be drawn -----------------------------------------------------------------


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize(
    "row",
    [
        SamplingRow(0, temperature=0, logprobs=2),
        SamplingRow(0, seed=3, logprobs=0),
        SamplingRow(0, top_p=0.9),
        SamplingRow(0, top_k=300),
        SamplingRow(0, min_p=0.1, repetition_penalty=1.1, output=[5]),
    ],
)
def test_a_row_that_is_not_finite_fails_alone(row: SamplingRow, poison: float) -> None:
    logits = logits_of(3)
    rows = [replace(row, logits_row=i) for i in range(3)]
    expected = draw(logits, rows)
    logits[1, 123] = poison
    drawn = draw(logits, rows)
    assert drawn[1] == Draw(-1, error=DrawError.NOT_FINITE)
    assert [drawn[0], drawn[2]] == [expected[0], expected[2]]


@pytest.mark.parametrize(
    "row", [SamplingRow(0, temperature=0), SamplingRow(0), SamplingRow(0, top_p=0.5)]
)
def test_a_row_with_nothing_left_to_draw_fails_alone(row: SamplingRow) -> None:
    logits = logits_of(2)
    emptied = replace(row, allowed=[4, 5], banned=[5, 4])
    drawn = draw(logits, [emptied, replace(row, logits_row=1)])
    assert drawn[0] == Draw(-1, error=DrawError.NOTHING_ALLOWED)
    assert drawn[1].error is None


def test_tokens_can_be_read_on_the_device_before_they_are_collected() -> None:
    logits = logits_of(4)
    logits[3] = math.nan
    settings = [{"temperature": 0.0}, {}, {"top_k": 5}, {"top_p": 0.5}, {"temperature": 0.0}]
    rows = [SamplingRow(i % 4, seed=i, **own) for i, own in enumerate(settings)]
    rows.append(SamplingRow(3, top_p=0.9))
    drawn = Sampler(VOCAB).launch(logits, rows)
    early = drawn.tokens[torch.tensor(drawn.places)].tolist()
    collected = drawn.collect()
    assert not any(draw.is_late for draw in collected)
    assert [t for t, d in zip(early, collected, strict=True) if d.error is None] == [
        draw.token for draw in collected if draw.error is None
    ]
    assert collected[3].error is not None
    assert all(0 <= token < VOCAB for token in early), "no id the embedding does not have"


def test_no_rows_draw_nothing() -> None:
    assert draw(logits_of(1), []) == []


# ---- logprobs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", [5, 1_000, 9_000])
def test_logprobs_are_the_log_softmax_of_the_raw_logits(vocab: int) -> None:
    logits = logits_of(6, vocab)
    rows = [
        SamplingRow(i, temperature=0.3, logprobs=20, logit_bias={0: 50.0}, output=[1], seed=i)
        for i in range(6)
    ]
    exact = torch.log_softmax(logits.double(), dim=-1)
    for row, each in zip(exact, draw(logits, rows), strict=True):
        assert each.logprob is not None
        assert each.logprob.logprob == pytest.approx(row[each.token].item(), abs=1e-5)
        assert each.logprob.rank == int((row > row[each.token]).sum()) + 1
        values, ids = row.topk(min(20, vocab))
        assert each.logprob.top_ids == ids.tolist()
        assert each.logprob.top_logprobs == pytest.approx(values.tolist(), abs=1e-5)


def test_zero_logprobs_is_on_without_alternatives_and_none_is_off() -> None:
    off, zero = draw(logits_of(2), [SamplingRow(0), SamplingRow(1, logprobs=0)])
    assert off.logprob is None
    assert zero.logprob is not None
    assert zero.logprob.top_ids == []


def test_alternatives_among_equals_come_in_order_of_id() -> None:
    (drawn,) = draw(torch.zeros(1, 5_000), [SamplingRow(0, temperature=0, logprobs=5)])
    assert drawn.logprob is not None
    assert drawn.logprob.top_ids == [0, 1, 2, 3, 4]
    assert drawn.logprob.rank == 1


def test_logprob_belongs_to_the_token_of_the_second_try() -> None:
    """Flat logits: 256 candidates never hold 90 % of them."""
    logits = logits_of(4, 9_000, spread=0.1)
    rows = [SamplingRow(i, top_p=0.9, logprobs=1, seed=i) for i in range(4)]
    exact = torch.log_softmax(logits, dim=-1)
    for row, each in zip(exact, draw(logits, rows), strict=True):
        assert each.logprob is not None
        assert each.logprob.logprob == pytest.approx(row[each.token].item(), abs=1e-5)


def test_prompt_logprobs_are_those_of_each_target() -> None:
    logits = logits_of(700)
    targets = list(range(700))
    exact = torch.log_softmax(logits, dim=-1)
    scores = prompt_logprobs(logits, targets, 2)
    assert [each.logprob for each in scores] == pytest.approx(
        exact[range(700), targets].tolist(), abs=1e-5
    )
    assert [each.top_ids for each in scores] == exact.topk(2).indices.tolist()
    assert prompt_logprobs(logits[:0], [], 2) == []


def test_draw_settings_of_off_filters_keep_everything() -> None:
    row = SamplingRow(0, top_k=-1).draw_settings(50)
    assert row == DrawSettings(uniform(0, 0, 0), 1.0, 50, 1.0, -math.inf)
