"""The compiled sampler against the tensor operations that are its specification."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.kernels import kernel_status
from model.kernels.sampling import RowsKernel, rows_kernel
from model.logprobs import prompt_logprobs
from model.penalties import PenaltyState, adjust
from model.random_draws import uniform
from model.sampler import DrawnGroups, Sampler
from model.sampling_row import Draw, DrawError, Kind, Packed, SamplingRow

pytestmark = pytest.mark.skipif(
    rows_kernel(8, 1) is None, reason=f"no kernels here: {kernel_status()[1]}"
)


def kernel_of(vocab: int, threads: int = 2) -> RowsKernel:
    kernel = rows_kernel(vocab, threads)
    assert kernel is not None
    return kernel


def compiled(logits: Tensor, rows: list[SamplingRow], threads: int = 2) -> list[Draw]:
    return kernel_of(logits.size(1), threads).draw(logits, rows).collect()


def by_tensors(logits: Tensor, rows: list[SamplingRow]) -> list[Draw]:
    drawn = Sampler(logits.size(1), compiled=False).launch(logits, rows)
    assert isinstance(drawn, DrawnGroups)
    return drawn.collect()


def logits_of(num_rows: int, vocab: int, *, seed: int = 0, spread: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, vocab, generator=generator) * spread


def assert_drawn_rightly(logits: Tensor, row: SamplingRow, token: int) -> None:
    """The token in whose part of the kept prefix the uniform falls, to the rounding of ``exp``."""
    adjusted = logits[row.logits_row : row.logits_row + 1].clone()
    adjust(adjusted, [row])
    order = torch.sort(adjusted[0], descending=True, stable=True)[1]
    kind = row.kind(logits.size(1))
    if kind is Kind.GREEDY:
        assert token == order[0]
        return
    if kind is Kind.UNFILTERED:
        order = torch.arange(logits.size(1))
    own = row.draw_settings(logits.size(1))
    exponents = (adjusted[0].double() - adjusted.max()) * own.inverse_temperature
    shares = exponents.exp()[order]
    num_left = min(int((exponents >= own.log_min_p - 1e-5).sum()), own.top_k)
    shares[num_left:] = 0
    ends = shares.cumsum(0)
    place = int((order == token).nonzero())
    slack = 2e-6 * ends[-1]
    assert ends[place] - shares[place] <= own.top_p * ends[-1] + slack, "outside the kept prefix"
    last = int(torch.searchsorted(ends, own.top_p * ends[-1]).clamp(max=num_left - 1))
    # Where the prefix ends to a hair of a border either end will do.
    kept = [ends[min(max(i, 0), num_left - 1)] for i in (last - 1, last, last + 1)]
    assert any(
        ends[place] - shares[place] - slack <= own.uniform * mass <= ends[place] + slack
        for mass in kept
    )


ROWS = st.builds(
    SamplingRow,
    logits_row=st.integers(0, 3),
    seed=st.integers(-(2**63), 2**63 - 1),
    choice=st.integers(0, 127),
    position=st.integers(0, 200_000),
    temperature=st.sampled_from([0.0, 1e-5, 0.1, 0.7, 1.0, 2.0]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.3, 1e-9]),
    top_k=st.sampled_from([-1, 0, 1, 40, 64, 300, 5_000]),
    min_p=st.sampled_from([0.0, 0.0, 1e-4, 0.2, 1.0]),
    presence_penalty=st.sampled_from([0.0, 1.5]),
    frequency_penalty=st.sampled_from([0.0, -0.5]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    logit_bias=st.dictionaries(st.integers(0, 69), st.floats(-100, 100, width=32), max_size=3),
    allowed=st.none() | st.lists(st.integers(0, 69), min_size=1, max_size=20),
    banned=st.lists(st.integers(0, 69), max_size=3),
    prompt=st.lists(st.integers(0, 69), max_size=5),
    output=st.lists(st.integers(0, 69), max_size=5),
    logprobs=st.sampled_from([None, 0, 3, 20]),
)


@settings(max_examples=80, deadline=None)
@given(
    rows=st.lists(ROWS, min_size=1, max_size=6),
    vocab=st.sampled_from([70, 128, 1_000, 9_001]),
    spread=st.sampled_from([0.0, 0.01, 1.0, 4.0]),
    levels=st.sampled_from([None, 2.0]),
    threads=st.sampled_from([1, 2]),
)
def test_rows_are_drawn_and_scored_as_tensor_operations_do(
    rows: list[SamplingRow], vocab: int, spread: float, levels: float | None, threads: int
) -> None:
    logits = logits_of(4, vocab, spread=spread)
    if levels is not None:
        logits = (logits * levels).round() / levels
    expected = by_tensors(logits, rows)
    for row, mine, wanted in zip(rows, compiled(logits, rows, threads), expected, strict=True):
        assert mine.error is wanted.error
        if mine.error is not None:
            continue
        if mine.token != wanted.token:  # a border met to the last bit: rare, and then right too
            assert_drawn_rightly(logits, row, mine.token)
            continue
        if wanted.logprob is None:
            assert mine.logprob is None
            continue
        assert mine.logprob is not None
        assert mine.logprob.rank == wanted.logprob.rank
        assert mine.logprob.top_ids == wanted.logprob.top_ids
        assert mine.logprob.logprob == pytest.approx(wanted.logprob.logprob, abs=2e-5)
        assert mine.logprob.top_logprobs == pytest.approx(wanted.logprob.top_logprobs, abs=2e-5)


@pytest.mark.parametrize(
    "row",
    [
        SamplingRow(0),
        SamplingRow(0, temperature=1.7),
        SamplingRow(0, top_p=0.9, temperature=2.0),
        SamplingRow(0, top_p=0.99),
        SamplingRow(0, top_k=2_000),
        SamplingRow(0, top_k=50, top_p=0.9, temperature=0.7),
        SamplingRow(0, min_p=0.01, top_p=0.95),
    ],
)
@pytest.mark.parametrize("spread", [0.05, 2.0])
def test_nearly_all_draws_are_the_same_tokens(row: SamplingRow, spread: float) -> None:
    logits = logits_of(1, 30_000, spread=spread)
    rows = [replace(row, position=position) for position in range(300)]
    mine = [draw.token for draw in compiled(logits, rows)]
    wanted = [draw.token for draw in by_tensors(logits, rows)]
    differing = [i for i in range(300) if mine[i] != wanted[i]]
    # A part of a flat row is 3e-5 of it, and exp rounds to 1e-7: one in a hundred may differ.
    assert len(differing) <= 9
    for i in differing:
        assert_drawn_rightly(logits, rows[i], mine[i])


def test_penalties_are_applied_as_by_tensors() -> None:
    logits = logits_of(1, 3_000)
    prompt = torch.randint(3_000, (500,), generator=torch.Generator().manual_seed(1)).tolist()
    state = PenaltyState(prompt)
    state.catch_up(prompt + prompt[:200] + prompt[:50])
    row = SamplingRow(
        0,
        temperature=0,
        repetition_penalty=1.4,
        presence_penalty=0.3,
        frequency_penalty=0.7,
        logit_bias={5: -3.0, prompt[0]: 9.0},
        penalties=state,
    )
    expected = logits.clone()
    adjust(expected, [row])
    # Ban the largest again and again: the order of tokens is that of the adjusted logits.
    order = torch.sort(expected[0], descending=True, stable=True)[1].tolist()
    rows = [replace(row, banned=order[:count]) for count in range(0, 2_000, 7)]
    assert [draw.token for draw in compiled(logits, rows)] == order[0:2_000:7]


def test_uniforms_are_those_of_python() -> None:
    """Equal logits: the id drawn is the uniform itself."""
    vocab = 1 << 16
    logits = torch.zeros(1, vocab)
    triples = [(0, 0, 0), (42, 1, 1000), (-(2**63), 127, 131_071), (2**64 - 1, 3, 5)]
    rows = [SamplingRow(0, seed=s, choice=c, position=p) for s, c, p in triples]
    for triple, draw in zip(triples, compiled(logits, rows), strict=True):
        assert draw.token == int(uniform(*triple) * vocab)


def test_ids_outside_the_vocabulary_touch_no_neighbour() -> None:
    logits = logits_of(3, 100)
    row = SamplingRow(1, temperature=0, logit_bias={-1: 1e9, 100: 1e9}, banned=[-5, 100, 2**40])
    before = logits.clone()
    assert compiled(logits, [row])[0].token == int(logits[1].argmax())
    assert torch.equal(logits, before)
    nothing = replace(row, allowed=[-1, 100])
    assert compiled(logits, [nothing])[0].error is DrawError.NOTHING_ALLOWED


@pytest.mark.parametrize("vocab", [5, 1_000, 9_001])
@pytest.mark.parametrize("wanted", [0, 2, 20])
def test_prompt_logprobs_are_those_of_tensors(vocab: int, wanted: int) -> None:
    logits = logits_of(200, vocab).mul(4).round().div(4)
    targets = [7 * i % vocab for i in range(200)]
    mine = kernel_of(vocab).score(logits, targets, wanted)
    for one, other in zip(mine, prompt_logprobs(logits, targets, wanted), strict=True):
        assert (one.rank, one.top_ids) == (other.rank, other.top_ids)
        assert one.logprob == pytest.approx(other.logprob, abs=2e-5)
        assert one.top_logprobs == pytest.approx(other.top_logprobs, abs=2e-5)
    assert kernel_of(vocab).score(logits[:0], [], wanted) == []


def test_logits_that_are_no_number_beside_an_allowed_one_spoil_its_logprob_alone() -> None:
    logits = logits_of(1, 200)
    logits[0, 50] = math.nan
    allowed = SamplingRow(0, allowed=[3, 4], temperature=0)
    plain, scored = compiled(logits, [allowed, replace(allowed, logprobs=1)])
    assert plain.token == (3 if logits[0, 3] >= logits[0, 4] else 4)
    assert scored.error is DrawError.NOT_FINITE


def test_packed_settings_serve_every_step_of_a_request() -> None:
    logits = logits_of(4, 500)
    allowed = list(range(0, 500, 3))
    row = SamplingRow(0, seed=4, top_p=0.9, logit_bias={9: 2.0}, allowed=allowed, logprobs=2)
    kept = Packed()
    for position in range(40):
        step = replace(row, logits_row=position % 4, position=position, banned=[3 * position])
        assert compiled(logits, [replace(step, packed=kept)]) == compiled(logits, [step])
