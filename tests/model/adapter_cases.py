"""One layer's slots with random adapters, and what they add by plain products in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from model.adapters import AdapterSlots, Run
from model.lora import LowRank


def random_slots(
    dtype: torch.dtype, parts: tuple[int, ...], inputs: int, device: str = "cpu"
) -> AdapterSlots:
    """Four slots: whole, of low rank, with one part only, empty."""
    generator = torch.Generator().manual_seed(1)
    slots = AdapterSlots(4, 16, inputs, parts, dtype, torch.device(device))
    for slot, (rank, held) in enumerate(
        [(16, range(len(parts))), (5, range(len(parts))), (8, [0])]
    ):
        slots.fill(
            slot,
            {
                part: LowRank(
                    torch.randn(rank, inputs, generator=generator).to(dtype) * 0.1,
                    torch.randn(rank, parts[part], generator=generator).to(dtype),
                )
                for part in held
            },
        )
    return slots


def expected(x: Tensor, out: Tensor, slots: AdapterSlots, runs: list[Run]) -> Tensor:
    wanted = out.double()
    for slot, first, end in runs:
        rank = slots.ranks[slot]
        for part in slots.held[slot]:
            down = slots.down[slot, part * rank : (part + 1) * rank].double()
            left, right = slots.borders[part : part + 2]
            up = slots.up[slot, :rank, left:right].double()
            wanted[first:end, left:right] += x[first:end].double() @ down.t() @ up
    return wanted


RUNS = [Run(0, 1, 2), Run(1, 2, 7), Run(2, 7, 9), Run(3, 9, 10), Run(0, 11, 30)]
