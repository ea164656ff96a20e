"""Run by test_adapters.py in a process of its own, where Triton interprets its kernels."""

from __future__ import annotations

import pytest
import torch

from model import adapters
from model.adapters import AdapterRows, Run, token_slots
from model.adapters_triton import add_by_token
from tests.model.adapter_cases import RUNS, expected, random_slots


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("inputs", "parts"), [(576, (576, 192, 192)), (64, (64,)), (100, (70, 70)), (300, (130,))]
)
def test_every_token_goes_through_its_own_slot(
    inputs: int, parts: tuple[int, ...], dtype: torch.dtype
) -> None:
    slots, generator = random_slots(dtype, parts, inputs), torch.Generator().manual_seed(0)
    x = torch.randn(31, inputs, generator=generator).to(dtype)
    out = torch.randn(31, sum(parts), generator=generator).to(dtype)
    wanted, before = expected(x, out, slots, RUNS), out.clone()
    tokens = torch.tensor(token_slots(RUNS, 31), dtype=torch.int32)
    add_by_token(x, out, AdapterRows(RUNS, tokens), slots)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out.double(), wanted, atol=tolerance, rtol=tolerance)
    for untouched in (0, 9, 10, 30):
        assert torch.equal(out[untouched], before[untouched])


def test_tokens_of_long_runs_are_left_to_others() -> None:
    slots = random_slots(torch.float32, (64,), 64)
    x, out = torch.randn(50, 64), torch.zeros(50, 64)
    runs = [Run(0, 0, 40), Run(1, 40, 50)]
    add_by_token(x, out, AdapterRows(runs, torch.tensor(token_slots(runs, 50)).int()), slots)
    assert not out[:40].any()
    assert out[40:].any()


@pytest.mark.parametrize("layer", [(64,), (48, 16, 16)])
def test_a_graph_serves_whatever_slots_its_tensor_comes_to_hold(
    layer: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is recorded once knows no run; the slots may be filled, emptied and changed later."""
    monkeypatch.setattr(adapters, "_by_token", lambda device: add_by_token)
    slots = random_slots(torch.float32, layer, 64)
    tokens = torch.full((31,), -1, dtype=torch.int32)
    rows = AdapterRows([], tokens, is_any=True)
    assert slots.adds_to(rows)
    x, out = torch.randn(31, 64), torch.randn(31, sum(layer))
    for runs in (RUNS, [Run(2, 0, 31)], []):
        tokens.copy_(torch.tensor(token_slots(runs, 31)))
        found = out.clone()
        slots.add(x, found, rows)
        wanted = expected(x, out, slots, runs)
        torch.testing.assert_close(found.double(), wanted, atol=1e-4, rtol=1e-4)
