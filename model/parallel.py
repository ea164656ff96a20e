"""The ranks a network is sharded over; one rank, which does nothing, unless told otherwise."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class ParallelGroup:
    """``rank`` of ``size`` ranks that hold a slice of every layer each (tensor parallelism)."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    def share(self, count: int, what: str = "features") -> int:
        """How many of ``count`` this rank holds. Raises ValueError where they do not divide."""
        if count % self.size:
            raise ValueError(f"{count} {what} cannot be shared by {self.size} ranks")
        return count // self.size

    def all_reduce(self, x: Tensor) -> Tensor:
        """The ranks' tensors summed, on every rank; in place."""
        if self.size > 1:
            dist.all_reduce(x, group=self.group)
        return x

    def gather_columns(self, x: Tensor) -> Tensor:
        """[..., n] of every rank side by side: [..., size * n], on every rank."""
        if self.size == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return torch.cat(parts, dim=-1)
