"""Weights as 8-bit floats (e4m3) with a scale a tensor, an output or a block.

On a GPU that multiplies them (compute capability 8.9 and up) activations are rounded to the same
format, a scale a row; elsewhere on CUDA weights are widened for each product. Processors have no
such instruction: there the weights are widened once, when they are loaded.
"""

# N outputs, K inputs, M rows

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FORMAT = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3
_ROWWISE = (9, 0)  # scales of rows and outputs in torch._scaled_mm: Hopper and later
_TENSORWISE = (8, 9)  # no more than one scale a side: Ada


@dataclass(frozen=True)
class Float8Weight:
    """values [N, K] e4m3; scales [n, k] float32: each serves N / n outputs and K / k inputs.

    Blocks at the lower and right edges may be cut: ``block`` says how large the whole ones are.
    """

    values: Tensor
    scales: Tensor
    block: tuple[int, int]

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    @property
    def num_bytes(self) -> int:
        return self.values.numel() + self.scales.numel() * self.scales.element_size()

    @property
    def is_by_output(self) -> bool:
        """Whether scales are of whole outputs, as products with scaled rows need them."""
        return self.block[1] >= self.shape[1] and self.block[0] == 1

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """[N, K]; a band of blocks at a time."""
        outputs, inputs = self.shape
        weight = torch.empty(outputs, inputs, dtype=dtype, device=self.values.device)
        tall = 256 if self.values.device.type == "cpu" else 1 << 14
        height = self.block[0] * max(1, tall // self.block[0])
        for start in range(0, outputs, height):
            rows = slice(start, min(start + height, outputs))
            weight[rows] = self.values[rows].float() * self._spread(rows, inputs)
        return weight

    def _spread(self, rows: slice, inputs: int) -> Tensor:
        """One scale a weight, or what broadcasts to it."""
        tall, wide = self.block
        first, end = rows.start // tall, -(-rows.stop // tall)
        scales = self.scales[first:end].float()
        if tall > 1:
            scales = scales.repeat_interleave(tall, 0)[: rows.stop - rows.start]
        return scales if wide >= inputs else scales.repeat_interleave(wide, 1)[:, :inputs]

    def outputs(self, start: int, count: int) -> Float8Weight:
        return _cut(self, 0, start, count)

    def inputs(self, start: int, count: int) -> Float8Weight:
        return _cut(self, 1, start, count)

    def by_output(self) -> Float8Weight:
        """The same weight with a scale an output, where scales are of whole rows."""
        tall = self.block[0]
        scales = self.scales.float().repeat_interleave(tall, 0)[: self.shape[0]]
        return Float8Weight(self.values, scales, (1, self.shape[1]))

    def to(self, device: torch.device | str) -> Float8Weight:
        values = self.values.to(device, memory_format=torch.contiguous_format, copy=True)
        return Float8Weight(values, self.scales.to(device, torch.float32, copy=True), self.block)


def _cut(weight: Float8Weight, axis: int, start: int, count: int) -> Float8Weight:
    """A run of outputs or inputs; where it cuts blocks, they become slices of one."""
    values = weight.values.narrow(axis, start, count)
    size = weight.block[axis]
    if size >= weight.values.shape[axis]:
        return Float8Weight(values, weight.scales, weight.block)
    if start % size:
        scales = weight.scales.repeat_interleave(size, axis).narrow(axis, start, count)
        block = (1, weight.block[1]) if axis == 0 else (weight.block[0], 1)
        return Float8Weight(values, scales, block)
    scales = weight.scales.narrow(axis, start // size, -(-count // size))
    return Float8Weight(values, scales, weight.block)


def stack(parts: list[Float8Weight]) -> Float8Weight | None:
    """Outputs one above the other; None where some scales are of whole rows and others not."""
    if len(parts) == 1:
        return parts[0]
    inputs = parts[0].shape[1]
    if all(part.block[1] >= inputs for part in parts):
        parts = [part.by_output() for part in parts]
    block = parts[0].block
    is_whole = all(part.shape[0] % block[0] == 0 for part in parts[:-1])
    if any(part.block != block for part in parts) or not is_whole:
        return None
    values = torch.cat([part.values.view(torch.uint8) for part in parts]).view(FORMAT)
    return Float8Weight(values, torch.cat([part.scales for part in parts]), block)


def quantize_float8(weight: Tensor) -> Float8Weight:
    """A scale an output: its largest magnitude becomes the largest number."""
    values = torch.empty(weight.shape, dtype=FORMAT, device=weight.device)
    scales = torch.empty(weight.shape[0], 1, device=weight.device)
    for start in range(0, weight.shape[0], 1024):
        rows = slice(start, start + 1024)
        values[rows], scales[rows] = round_rows(weight[rows])
    return Float8Weight(values, scales, (1, weight.shape[1]))


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """[M, K] -> e4m3 [M, K] and scales [M, 1]."""
    wide = x.float()
    scales = (wide.abs().amax(-1, keepdim=True) / LARGEST).clamp_(min=1e-12)
    return (wide / scales).clamp_(-LARGEST, LARGEST).to(FORMAT), scales


@dataclass(frozen=True)
class ScaledProduct:
    """Both sides in e4m3, a scale a row and an output (Hopper and later)."""

    weight: Float8Weight
    dtype: torch.dtype

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        rows, scales = round_rows(x)
        out: Tensor = torch._scaled_mm(
            rows,
            self.weight.values.t(),
            scale_a=scales,
            scale_b=self.weight.scales.t().contiguous(),
            out_dtype=torch.bfloat16,
        )
        out = out.to(self.dtype)
        return out if bias is None else out + bias


@dataclass(frozen=True)
class PlainProduct:
    """As above where the device knows no scales of rows: they are multiplied in afterwards."""

    weight: Float8Weight
    dtype: torch.dtype

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        rows, scales = round_rows(x)
        one = torch.ones((), device=x.device)
        out: Tensor = torch._scaled_mm(
            rows, self.weight.values.t(), scale_a=one, scale_b=one, out_dtype=torch.float32
        )
        out = out.mul_(scales).mul_(self.weight.scales.t()).to(self.dtype)
        return out if bias is None else out + bias


def pack_float8(weight: Float8Weight, dtype: torch.dtype) -> ScaledProduct | PlainProduct | None:
    """The product in e4m3 where the device has one for this weight's scales."""
    capability = (0, 0)
    if weight.values.is_cuda:
        capability = torch.cuda.get_device_capability(weight.values.device)
    outputs, inputs = weight.shape
    if weight.is_by_output and outputs % 16 == 0 and inputs % 16 == 0:
        if capability >= _ROWWISE:
            return ScaledProduct(weight, dtype)
        if capability >= _TENSORWISE:
            return PlainProduct(weight, dtype)
    return None
