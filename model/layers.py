"""The parts of a layer: one linear class that knows its parts, and the norm."""

# T tokens, K inputs, N outputs

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.parallel import ParallelGroup


@dataclass(frozen=True)
class WeightSlot:
    """Where one tensor of a checkpoint goes. ``shape`` is the checkpoint's, not this rank's."""

    shape: tuple[int, ...]
    fill: Callable[[Tensor], None]


class Linear:
    """y = x W^T + b over one or several stacked parts (QKV, gate and up).

    ``split`` says how ranks share it: "column" cuts every part's outputs, "row" the inputs (the
    ranks' results are then summed), None keeps all.
    """

    def __init__(
        self,
        inputs: int,
        parts: dict[str, int],
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device,
        group: ParallelGroup,
        split: str | None = None,
    ) -> None:
        self._parts, self._group, self._split = parts, group, split
        self._inputs = inputs
        columns = group.share(inputs) if split == "row" else inputs
        outputs = sum(self._own(size) for size in parts.values())
        self.weight = torch.empty(outputs, columns, dtype=dtype, device=device)
        self.bias = torch.zeros(outputs, dtype=dtype, device=device) if bias else None
        self._packed: Tensor | None = None

    def _own(self, size: int) -> int:
        return self._group.share(size) if self._split == "column" else size

    def slots(self) -> dict[str, WeightSlot]:
        """One slot a part and kind, by the part's Hugging Face name."""
        found: dict[str, WeightSlot] = {}
        start = 0
        for name, size in self._parts.items():
            end = start + self._own(size)
            found[f"{name}.weight"] = WeightSlot(
                (size, self._inputs), self._filler("weight", start, end)
            )
            if self.bias is not None:
                found[f"{name}.bias"] = WeightSlot((size,), self._filler("bias", start, end))
            start = end
        return found

    def _filler(self, kind: str, start: int, end: int) -> Callable[[Tensor], None]:
        def fill(tensor: Tensor) -> None:
            target = self.weight if kind == "weight" else self.bias
            assert target is not None
            target[start:end].copy_(self._shard(tensor, kind))

        return fill

    def _shard(self, tensor: Tensor, kind: str) -> Tensor:
        if self._group.size == 1 or self._split is None:
            return tensor
        if self._split == "column":
            return tensor.chunk(self._group.size, dim=0)[self._group.rank]
        if kind == "bias":  # summed over the ranks: only one may add it
            return tensor if self._group.rank == 0 else torch.zeros_like(tensor)
        return tensor.chunk(self._group.size, dim=1)[self._group.rank]

    def pack(self) -> None:
        """Reorder for oneDNN, dropping the source: one pack serves every number of rows."""
        if self.weight.device.type == "cpu" and self.weight.dtype == torch.bfloat16 and can_pack():
            self._packed = torch.ops.mkldnn._reorder_linear_weight(self.weight, None)
            self.weight = torch.empty(0, dtype=self.weight.dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """[T, K] -> [T, N], summed over the ranks where the inputs are split."""
        if self._packed is not None:
            out: Tensor = torch.ops.mkldnn._linear_pointwise(
                x, self._packed, self.bias, "none", [], ""
            )
        else:
            out = F.linear(x, self.weight, self.bias)
        return self._group.all_reduce(out) if self._split == "row" else out


def can_pack() -> bool:
    """oneDNN's operators are private to PyTorch: use them only where they are."""
    return bool(
        torch.backends.mkldnn.enabled
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


class RMSNorm(nn.Module):
    """Zhang and Sennrich 2019: scaled by the root mean square, computed in float32."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = torch.ones(size, dtype=dtype, device=device)
        self.eps = eps

    def slot(self) -> WeightSlot:
        return WeightSlot(tuple(self.weight.shape), lambda tensor: void(self.weight.copy_(tensor)))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), self.eps).to(x.dtype)


def void(_: object) -> None:
    """For lambdas whose value nobody wants."""
