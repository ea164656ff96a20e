"""Weights as small unsigned integers with a scale for each group of inputs.

    weight[n, k] = (values[n, k] - zeros[n, k // group]) * scales[n, k // group]

One layout for every scheme of 8 or 4 bits, whether quantized here or read from a checkpoint.
"""

# N outputs, K inputs

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

GROUPS = {8: 64, 4: 32}  # inputs that share a scale, by bits, where this file quantizes


@dataclass(frozen=True)
class QuantizedWeight:
    """``values`` uint8: [N, K] of 8 bits, or [N, K / 2] of 4 bits, the even input in the low half.

    scales: [N, K / group] float32. zeros: [N, K / group] uint8, or None for the middle, 2^(bits-1).
    ``order`` [K] int64, where inputs were sorted for quantization: the k-th input of ``values`` is
    input ``order[k]`` of the layer.
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

    def unpacked(self) -> Tensor:
        """[N, K] uint8, one value a byte."""
        if self.bits == 8:
            return self.values
        return torch.stack((self.values & 15, self.values >> 4), dim=-1).flatten(1)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """[N, K], in the layer's own order of inputs."""
        outputs, inputs = self.shape
        values = self.unpacked().view(outputs, -1, self.group).float()
        middle = 1 << (self.bits - 1)
        zeros = middle if self.zeros is None else self.zeros.unsqueeze(-1).float()
        weight = ((values - zeros) * self.scales.unsqueeze(-1)).view(outputs, inputs)
        if self.order is not None:
            weight = torch.empty_like(weight).index_copy_(1, self.order, weight)
        return weight.to(dtype)


def quantize(weight: Tensor, bits: int, group: int | None = None) -> QuantizedWeight:
    """Symmetric, to nearest: each group's largest magnitude becomes the largest integer.

    Raises ValueError where the inputs are no multiple of the group.
    """
    outputs, inputs = weight.shape
    group = group or GROUPS[bits]
    if inputs % group:
        raise ValueError(f"{inputs} inputs cannot be quantized in groups of {group}")
    largest = (1 << (bits - 1)) - 1
    grouped = weight.float().view(outputs, -1, group)
    scales = grouped.abs().amax(-1) / largest
    steps = torch.where(scales > 0, scales, 1.0).unsqueeze(-1)
    values = (grouped / steps).round_().clamp_(-largest, largest).add_(largest + 1)
    packed = values.to(torch.uint8).view(outputs, inputs)
    if bits == 4:
        packed = packed[:, ::2] | packed[:, 1::2] << 4
    return QuantizedWeight(packed, scales, None, bits, group)
