"""Final hidden states of a text, pooled as they come."""

# n tokens

from __future__ import annotations

import torch
from torch import Tensor


class StatePool:
    """A running mean. Sums are float64, so that how a text was cut into chunks shows nowhere."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._count = 0

    def add(self, states: Tensor) -> None:
        """[n, hidden] float32; waits for nothing."""
        own = states.sum(0, dtype=torch.float64)
        self._sum = own if self._sum is None else self._sum + own
        self._count += states.size(0)

    def mean(self) -> bytes:
        """[hidden] float32, little-endian. Waits for the device."""
        assert self._sum is not None, "nothing was pooled"
        return (self._sum / self._count).float().cpu().numpy().astype("<f4").tobytes()
