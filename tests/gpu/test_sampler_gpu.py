"""The sampler on the device draws what it draws on the CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.penalties import PenaltyState
from model.sampler import Sampler
from model.sampling_row import Draw, DrawError, SamplingRow

VOCAB = 128_256
SETTINGS = [
    SamplingRow(0, temperature=0),
    SamplingRow(0),
    SamplingRow(0, temperature=0.6, top_p=0.9),
    SamplingRow(0, top_k=40),
    SamplingRow(0, top_k=300, top_p=0.95),
    SamplingRow(0, min_p=0.05, temperature=1.4),
    SamplingRow(0, top_p=0.9, temperature=2.0),
    SamplingRow(0, temperature=0, logit_bias={17: 30.0}, banned=[18]),
    SamplingRow(0, allowed=[3, 5, 7_000], temperature=0.8),
    SamplingRow(0, repetition_penalty=1.3, frequency_penalty=0.3, presence_penalty=0.2),
]


def zipf_logits(num_rows: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    falling = -1.5 * torch.arange(1, VOCAB + 1).log()
    return torch.stack(
        [falling[torch.randperm(VOCAB, generator=generator)] for _ in range(num_rows)]
    )


def rows_of(num_rows: int) -> list[SamplingRow]:
    rows = []
    for i in range(num_rows):
        row = replace(SETTINGS[i % len(SETTINGS)], logits_row=i, seed=i, position=i)
        if row.repetition_penalty != 1.0:
            state = PenaltyState(range(1_000))
            state.catch_up(range(1_200))
            row = replace(row, penalties=state)
        rows.append(row)
    return rows


def draw(logits: Tensor, rows: list[SamplingRow]) -> list[Draw]:
    return Sampler(VOCAB, logits.device, compiled=False).launch(logits, rows).collect()


def test_draws_equal_those_of_the_cpu() -> None:
    """All but a few in a thousand: where exp differs in its last bit, a border may move."""
    logits, rows = zipf_logits(200), rows_of(200)
    here = [each.token for each in draw(logits.cuda(), rows)]
    there = [each.token for each in draw(logits, rows)]
    assert sum(a != b for a, b in zip(here, there, strict=True)) <= 1


def test_a_row_draws_the_same_alone_and_in_a_batch() -> None:
    logits, rows = zipf_logits(60).cuda(), rows_of(60)
    together = draw(logits, rows)
    alone = [draw(logits[i : i + 1], [replace(row, logits_row=0)])[0] for i, row in enumerate(rows)]
    assert together == alone


def test_logprobs_equal_log_softmax() -> None:
    logits = zipf_logits(8).cuda()
    exact = torch.log_softmax(logits.double(), dim=-1)
    rows = [SamplingRow(i, seed=i, logprobs=20) for i in range(8)]
    for row, drawn in zip(exact, draw(logits, rows), strict=True):
        assert drawn.logprob is not None
        assert drawn.logprob.logprob == pytest.approx(row[drawn.token].item(), abs=1e-5)
        assert drawn.logprob.top_ids == row.topk(20).indices.tolist()


def test_launch_does_not_wait_for_the_device() -> None:
    logits, rows = zipf_logits(20).cuda(), rows_of(20)
    draw(logits, rows)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        drawn = Sampler(VOCAB, "cuda").launch(logits, rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(drawn.collect()) == 20


def test_a_row_that_is_not_finite_fails_alone() -> None:
    logits, rows = zipf_logits(10).cuda(), rows_of(10)
    expected = draw(logits, rows)
    logits[2, 99] = float("nan")
    drawn = draw(logits, rows)
    assert drawn[2].error is DrawError.NOT_FINITE
    assert drawn[:2] + drawn[3:] == expected[:2] + expected[3:]
