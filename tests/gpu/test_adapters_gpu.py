"""Adapters on the device: the Triton kernels and the long runs beside them, against the CPU."""

from __future__ import annotations

import pytest
import torch

from model.adapters import AdapterRows, AdapterSlots, Run, token_slots
from tests.model.adapter_cases import RUNS, expected, random_slots

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("parts", [(576, 192, 192), (64,), (1536, 1536)])
def test_tokens_go_through_their_slots_on_the_device(
    parts: tuple[int, ...], dtype: torch.dtype
) -> None:
    slots: AdapterSlots = random_slots(dtype, parts, 576, "cuda")
    runs = [*RUNS, Run(1, 31, 100)]
    x = torch.randn(100, 576).to("cuda", dtype)
    out = torch.randn(100, sum(parts)).to("cuda", dtype)
    wanted = expected(x, out, slots, runs)
    tokens = torch.tensor(token_slots(runs, 100), dtype=torch.int32, device="cuda")
    slots.add(x, out, AdapterRows(runs, tokens))
    tolerance = 1e-3 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(out.double(), wanted, atol=tolerance, rtol=tolerance)
