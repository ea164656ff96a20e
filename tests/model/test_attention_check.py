"""The trial that every CUDA kernel stands on the device before it is believed, tried itself."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

from model import attention_cuda
from model.attention import gathered
from model.batch import Batch


@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pages", [None, torch.float8_e4m3fn, torch.int8])
def test_what_computes_rightly_passes(
    dtype: torch.dtype, head_size: int, pages: torch.dtype | None
) -> None:
    error = attention_cuda._largest_error(gathered, pages or dtype, dtype, head_size, "cpu")
    assert error < attention_cuda._TOLERANCE


@pytest.mark.parametrize("row", [0, 3])
@pytest.mark.parametrize("wrong", [0.1, float("nan")])
def test_a_row_that_is_wrong_does_not(row: int, wrong: float) -> None:
    def attend(q: Tensor, keys: Tensor, values: Tensor, batch: Batch, *rest: object) -> Tensor:
        out = gathered(q, keys, values, batch, 0.125, None)
        out[row] += wrong
        return out

    error = attention_cuda._largest_error(attend, torch.bfloat16, torch.bfloat16, 64, "cpu")
    assert not error < attention_cuda._TOLERANCE


@pytest.mark.parametrize(("error", "right"), [(0.01, True), (0.1, False), (float("nan"), False)])
def test_what_is_wrong_is_told_and_not_used(
    error: float, right: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(attention_cuda, "_largest_error", lambda *call: error)
    assert attention_cuda._is_right(gathered, "own") == right
    assert ("own attention is wrong on this device" in caplog.text) != right


def test_what_does_not_run_is_told_and_not_used(caplog: pytest.LogCaptureFixture) -> None:
    def attend(*call: object) -> Tensor:
        raise RuntimeError("no kernel image is available")

    with caplog.at_level(logging.WARNING):
        assert not attention_cuda._is_right(attend, "own")
    assert "own attention does not run on this device" in caplog.text
