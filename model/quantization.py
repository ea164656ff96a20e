"""Weights as small unsigned integers with a scale for each group of inputs.

    weight[n, k] = (values[n, k] - zeros[n, k // group]) * scales[n, k // group]

One layout for every scheme of 8 or 4 bits, whether quantized here or read from a checkpoint.
"""

# N outputs, K inputs

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

GROUPS = {8: 64, 4: 32}  # inputs that share a scale, by bits, where this file quantizes
SMALLEST_GROUP = 16  # below it a weight's scales take more than it saves
# Weights converted at a time: temporaries stay near a processor's cache, a GPU is kept busy.
_BLOCK, _BLOCK_ON_GPU = 1 << 19, 1 << 25
# Multiples of the scale at which a group's largest magnitude is kept, tried in turn for 4 bits.
_RATIOS = (1.0, 1.05, 0.95, 0.9, 0.85, 0.8)


@dataclass(frozen=True)
class QuantizedWeight:
    """``values`` uint8: [N, K] of 8 bits, or [N, K / 2] of 4 bits, the even input in the low half.

    scales: [N, K / group] float32, of either sign. zeros: [N, K / group] uint8, or None for the
    middle, 2^(bits-1). ``order`` [K] int64, where inputs were sorted for quantization: the k-th
    input of ``values`` is input ``order[k]`` of the layer.
    """

    values: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int
    group: int
    order: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K), as the weight's would be."""
        outputs, width = self.values.shape
        return outputs, width * 8 // self.bits

    @property
    def num_bytes(self) -> int:
        tensors = (self.values, self.scales, self.zeros, self.order)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def unpacked(self) -> Tensor:
        """[N, K] uint8, one value a byte."""
        if self.bits == 8:
            return self.values
        return torch.stack((self.values & 15, self.values >> 4), dim=-1).flatten(1)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """[N, K], in the layer's own order of inputs; a block of rows at a time."""
        outputs, inputs = self.shape
        weight = torch.empty(outputs, inputs, dtype=dtype, device=self.values.device)
        for rows in row_blocks(outputs, inputs, self.values.device):
            part = self.widened(rows)
            if self.order is None:
                weight[rows] = part
            else:
                weight[rows, self.order] = part.to(dtype)
        return weight

    def widened(self, rows: slice) -> Tensor:
        """Some rows in float32, inputs as ``values`` has them."""
        part = self.outputs(rows)
        values = part.unpacked().view(part.values.shape[0], -1, part.group).float()
        zeros = 1 << (part.bits - 1) if part.zeros is None else part.zeros.unsqueeze(-1).float()
        return values.sub_(zeros).mul_(part.scales.unsqueeze(-1)).flatten(1)

    def outputs(self, rows: slice | Tensor) -> QuantizedWeight:
        """Some of the outputs, in the order given."""
        zeros = None if self.zeros is None else self.zeros[rows]
        return replace(self, values=self.values[rows], scales=self.scales[rows], zeros=zeros)

    def inputs(self, start: int, count: int) -> QuantizedWeight | None:
        """A run of the inputs; None where they were sorted, since groups then lie anywhere."""
        if self.order is not None:
            return None
        whole = self.in_groups(math.gcd(self.group, start, count))
        first, end = start // whole.group, (start + count) // whole.group
        return replace(
            whole,
            values=whole.values[:, start * self.bits // 8 : (start + count) * self.bits // 8],
            scales=whole.scales[:, first:end],
            zeros=None if whole.zeros is None else whole.zeros[:, first:end],
        )

    def in_groups(self, group: int) -> QuantizedWeight:
        """The same weight with its groups cut into smaller ones."""
        assert self.group % group == 0, f"groups of {self.group} into {group}"
        times = self.group // group
        if times == 1:
            return self
        zeros = None if self.zeros is None else self.zeros.repeat_interleave(times, 1)
        return replace(
            self, scales=self.scales.repeat_interleave(times, 1), zeros=zeros, group=group
        )

    def in_bytes(self) -> QuantizedWeight:
        """The same weight of 8 bits."""
        if self.bits == 8:
            return self
        return replace(self, values=self.unpacked(), zeros=self.stated_zeros(), bits=8)

    def stated_zeros(self) -> Tensor:
        if self.zeros is not None:
            return self.zeros
        return torch.full_like(self.scales, 1 << (self.bits - 1), dtype=torch.uint8)

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """On a device, contiguous; copies that share nothing with a mapped file."""
        return replace(
            self,
            values=_owned(self.values, device),
            scales=_owned(self.scales.float(), device),
            zeros=None if self.zeros is None else _owned(self.zeros, device),
            order=None if self.order is None else _owned(self.order, device),
        )


def _owned(tensor: Tensor, device: torch.device | str) -> Tensor:
    return tensor.to(device, memory_format=torch.contiguous_format, copy=True)


def stack(parts: Sequence[QuantizedWeight]) -> QuantizedWeight | None:
    """The parts' outputs one above the other, losslessly; None where their inputs' orders differ.

    Of unequal bits and groups the larger bits and the smaller groups serve all.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    if not all(_is_same(part.order, first.order) for part in parts):
        return None
    if any(part.bits != first.bits for part in parts):
        parts = [part.in_bytes() for part in parts]
    group = math.gcd(*(part.group for part in parts))
    parts = [part.in_groups(group) for part in parts]
    has_zeros = any(part.zeros is not None for part in parts)
    return QuantizedWeight(
        values=torch.cat([part.values for part in parts]),
        scales=torch.cat([part.scales for part in parts]),
        zeros=torch.cat([part.stated_zeros() for part in parts]) if has_zeros else None,
        bits=parts[0].bits,
        group=group,
        order=first.order,
    )


def _is_same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)


# --------------------------------------------------------------------------- quantizing


def quantize(weight: Tensor, bits: int, group: int | None = None) -> QuantizedWeight:
    """Symmetric, to nearest, scales rounded to bfloat16 so that files lose nothing more.

    8 bits: each group's largest magnitude becomes the largest integer. 4 bits: it becomes -8,
    whatever its sign, and of a few scales around that the one with the least squared error is
    taken. Raises ValueError where the inputs are no multiple of the group.
    """
    outputs, inputs = weight.shape
    group = group or GROUPS[bits]
    if inputs % group:
        raise ValueError(f"{inputs} inputs cannot be quantized in groups of {group}")
    device = weight.device
    values = torch.empty(outputs, inputs * bits // 8, dtype=torch.uint8, device=device)
    scales = torch.empty(outputs, inputs // group, device=device)
    for rows in row_blocks(outputs, inputs, device):
        grouped = weight[rows].float().view(-1, inputs // group, group)
        scales[rows] = _scales_8(grouped) if bits == 8 else _scales_4(grouped)
        middle = 1 << (bits - 1)
        levels = _levels(grouped, scales[rows], middle).add_(middle).to(torch.uint8).flatten(1)
        values[rows] = levels if bits == 8 else pack_halves(levels)
    return QuantizedWeight(values, scales, None, bits, group)


def fitting_group(inputs: int, bits: int) -> int | None:
    """The largest group that divides the inputs, from the usual one down; None if none does."""
    group = GROUPS[bits]
    while group >= SMALLEST_GROUP:
        if inputs % group == 0:
            return group
        group //= 2
    return None


def pack_halves(values: Tensor) -> Tensor:
    """[N, K] of 4 bits a byte -> [N, K / 2], the even input in the low half."""
    return values[:, ::2] | values[:, 1::2] << 4


def row_blocks(outputs: int, inputs: int, device: torch.device) -> Iterator[slice]:
    block = _BLOCK if device.type == "cpu" else _BLOCK_ON_GPU
    step = max(1, block // max(1, inputs))
    for start in range(0, outputs, step):
        yield slice(start, min(start + step, outputs))


def _scales_8(grouped: Tensor) -> Tensor:
    low, high = grouped.aminmax(dim=-1)
    return _storable(torch.maximum(-low, high) / 127)


def _scales_4(grouped: Tensor) -> Tensor:
    low, high = grouped.aminmax(dim=-1)
    widest = torch.where(-low >= high, low, high) / -8
    best = _storable(widest)
    least = _error(grouped, best)
    for ratio in _RATIOS[1:]:
        scales = _storable(widest * ratio)
        error = _error(grouped, scales)
        better = error < least
        best, least = torch.where(better, scales, best), torch.where(better, error, least)
    return best


def _storable(scales: Tensor) -> Tensor:
    """Scales of 0, of groups that are all 0, become 1."""
    rounded = scales.bfloat16().float()
    return torch.where(rounded == 0, 1.0, rounded)


def _levels(grouped: Tensor, scales: Tensor, middle: int) -> Tensor:
    """Signed whole numbers, as floats."""
    lowest = -middle if middle == 8 else 1 - middle
    return (grouped / scales.unsqueeze(-1)).round_().clamp_(lowest, middle - 1)


def _error(grouped: Tensor, scales: Tensor) -> Tensor:
    levels = _levels(grouped, scales, 8)
    return levels.mul_(scales.unsqueeze(-1)).sub_(grouped).square_().sum(-1)
