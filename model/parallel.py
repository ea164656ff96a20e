"""The devices one model is split over. Alone it is the identity, and the network never asks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ParallelGroup:
    """``rank`` of ``size`` processes of torch.distributed's default group."""

    rank: int = 0
    size: int = 1

    def share(self, count: int) -> int:
        """This rank's part of ``count`` rows or heads."""
        assert count % self.size == 0, f"{count} does not divide over {self.size} devices"
        return count // self.size

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        if self.size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor
