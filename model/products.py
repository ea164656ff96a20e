"""How quantized weights are multiplied where no kernel of our own does it.

Weights widened for each product are right everywhere and take no memory. PyTorch's packed products
pay for a few rows (decoding) and are taken where they fit the weight.
"""

# M rows, N outputs, K inputs, G groups

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from model.float8 import Float8Weight, pack_float8
from model.quantization import QuantizedWeight, row_blocks
from model.schemes import AnyWeight, Quantized, in_words

if TYPE_CHECKING:
    from model.layers import Packed

logger = logging.getLogger(__name__)

_PACKED_GROUPS = (32, 64, 128, 256)  # of PyTorch's products of 4 bits
_FEW_ROWS = 4  # up to here PyTorch's product of 8 bits beats widening
_TRITON_ROWS = 64  # past it widening once costs less than reading the weight for every 16 rows
_ALLOWED = 0.1  # error of a product against the widened one; rounding activations to fp8 takes half


def pack_quantized(weight: AnyWeight, dtype: torch.dtype) -> Packed | None:
    """The fastest of what there is for a weight; None for a dense one, or if there is nothing."""
    if isinstance(weight, Tensor):
        return None
    if weight.values.is_cuda:
        return _pack_for_cuda(weight, dtype)
    if isinstance(weight, Float8Weight):
        return None
    if Int4OnCpu.takes(weight, dtype):
        return Int4OnCpu.pack(weight)
    if Int8ByOutput.takes(weight):
        return Int8ByOutput.pack(weight)
    return None


def _pack_for_cuda(weight: Quantized, dtype: torch.dtype) -> Packed | None:
    makers: list[Callable[[], Packed | None]]
    if isinstance(weight, Float8Weight):
        makers = [partial(pack_float8, weight, dtype)]
    else:
        makers = [partial(_int4_on_cuda, weight, dtype), partial(_by_triton, weight, dtype)]
    return next(filter(None, (_believed(make, weight, dtype) for make in makers)), None)


def _int4_on_cuda(weight: QuantizedWeight, dtype: torch.dtype) -> Int4OnCuda | None:
    return Int4OnCuda.pack(weight) if Int4OnCuda.takes(weight, dtype) else None


def _by_triton(weight: QuantizedWeight, dtype: torch.dtype) -> ByTriton | None:
    return ByTriton(weight) if ByTriton.takes(weight, dtype) else None


def _believed(
    make: Callable[[], Packed | None], weight: Quantized, dtype: torch.dtype
) -> Packed | None:
    """What ``make`` gives, if it computes rightly on this device with this very weight."""
    try:
        packed = make()
        if packed is None or _is_right(packed, weight, dtype):
            return packed
        why = "it computes wrongly"
    except Exception as error:  # whatever a kernel raises that does not run here
        why = str(error).split("\n")[0]
    logger.warning("a product of %s weights does not serve here: %s", in_words(weight), why)
    return None


def _is_right(packed: Packed, weight: Quantized, dtype: torch.dtype) -> bool:
    x = torch.randn(2, weight.shape[1], dtype=dtype, device=weight.values.device)
    wanted = multiply_widened(x, weight, None).float()
    error = (packed.multiply(x, None).float() - wanted).norm()
    return bool(error <= _ALLOWED * wanted.norm())


def multiply_widened(x: Tensor, weight: Quantized, bias: Tensor | None) -> Tensor:
    """x @ weight.T + bias; on a CPU block by block, each widened into cache."""
    if isinstance(weight, Float8Weight) or weight.values.is_cuda:
        return F.linear(x, weight.dequantize(x.dtype), bias)
    x = _sorted_inputs(x, weight.order)
    out = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype)
    for rows in row_blocks(*weight.shape, x.device):
        out[:, rows] = F.linear(x, weight.widened(rows).to(x.dtype))
    return out if bias is None else out.add_(bias)


def _sorted_inputs(x: Tensor, order: Tensor | None) -> Tensor:
    return x if order is None else x.index_select(1, order)


@dataclass(frozen=True)
class Int4OnCpu:
    """aten._weight_int4pack_mm_for_cpu: a step of 4 bits at a fourth of the bytes."""

    blocks: Tensor
    scales_and_zeros: Tensor  # [G, N, 2]: (value - 8) * scale + zero
    group: int
    order: Tensor | None

    @staticmethod
    def takes(weight: QuantizedWeight, dtype: torch.dtype) -> bool:
        """float32 has only a scalar loop there, 25 times slower than a dense product."""
        return (
            weight.values.device.type == "cpu"
            and dtype == torch.bfloat16
            and weight.bits == 4
            and weight.group in _PACKED_GROUPS
            and weight.shape[0] % 16 == 0
            and hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu")
        )

    @classmethod
    def pack(cls, weight: QuantizedWeight) -> Int4OnCpu:
        values = weight.unpacked().int()
        blocks = torch.ops.aten._convert_weight_to_int4pack_for_cpu(values, 1)
        return cls(blocks, _scales_and_zeros(weight), weight.group, weight.order)

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        out: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            _sorted_inputs(x, self.order).contiguous(),
            self.blocks,
            self.group,
            self.scales_and_zeros,
        )
        return out if bias is None else out + bias


@dataclass(frozen=True)
class Int4OnCuda:
    """aten._weight_int4pack_mm (tinygemm): bfloat16 on compute capability 8.0 and up."""

    tiles: Tensor
    scales_and_zeros: Tensor  # [G, N, 2]
    group: int
    order: Tensor | None

    @staticmethod
    def takes(weight: QuantizedWeight, dtype: torch.dtype) -> bool:
        outputs, inputs = weight.shape
        return (
            weight.values.is_cuda
            and weight.bits == 4
            and weight.group in _PACKED_GROUPS
            and dtype == torch.bfloat16
            and outputs % 8 == 0
            and inputs % 32 == 0
            and torch.cuda.get_device_capability(weight.values.device) >= (8, 0)
        )

    @classmethod
    def pack(cls, weight: QuantizedWeight) -> Int4OnCuda:
        inputs = weight.shape[1]
        depth = next(depth for depth in (8, 4, 2) if inputs % (16 * depth) == 0)
        swapped = weight.values << 4 | weight.values >> 4  # the even input in the high half
        tiles = torch.ops.aten._convert_weight_to_int4pack(swapped, depth)
        return cls(tiles, _scales_and_zeros(weight), weight.group, weight.order)

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        out: Tensor = torch.ops.aten._weight_int4pack_mm(
            _sorted_inputs(x, self.order).contiguous(),
            self.tiles,
            self.group,
            self.scales_and_zeros,
        )
        return out if bias is None else out + bias


@dataclass(frozen=True)
class ByTriton:
    """Our own kernel on CUDA, for any bits and groups."""

    weight: QuantizedWeight

    @staticmethod
    def takes(weight: QuantizedWeight, dtype: torch.dtype) -> bool:
        if importlib.util.find_spec("triton") is None:
            return False
        from model import products_triton

        is_half = dtype in (torch.bfloat16, torch.float16)
        return weight.values.is_cuda and is_half and products_triton.takes(weight)

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if x.shape[0] > _TRITON_ROWS:
            return multiply_widened(x, self.weight, bias)
        from model import products_triton

        out = products_triton.multiply(_sorted_inputs(x, self.weight.order), self.weight)
        return out if bias is None else out + bias


def _scales_and_zeros(weight: QuantizedWeight) -> Tensor:
    zeros = (8.0 - weight.stated_zeros().float()) * weight.scales
    pairs = torch.stack((weight.scales, zeros), dim=-1)  # N, G, 2
    return pairs.transpose(0, 1).bfloat16().contiguous()


@dataclass(frozen=True)
class Int8ByOutput:
    """8 bits with one scale an output, which is multiplied in after the sums."""

    values: Tensor  # [N, K] int8
    scales: Tensor  # [N]
    order: Tensor | None

    @staticmethod
    def takes(weight: QuantizedWeight) -> bool:
        return weight.bits == 8 and weight.group == weight.shape[1] and weight.zeros is None

    @classmethod
    def pack(cls, weight: QuantizedWeight) -> Int8ByOutput:
        values = (weight.values ^ 128).view(torch.int8)  # less 128
        return cls(values, weight.scales.flatten(), weight.order)

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        x = _sorted_inputs(x, self.order)
        sums = self._few(x) if self._is_few(x) else self._many(x)
        out = (sums * self.scales).to(x.dtype)
        return out if bias is None else out + bias

    def _is_few(self, x: Tensor) -> bool:
        return x.shape[0] <= _FEW_ROWS and x.device.type == "cpu" and x.dtype == torch.bfloat16

    def _few(self, x: Tensor) -> Tensor:
        one = torch.ones((), dtype=x.dtype).expand(self.values.shape[0]).contiguous()
        out: Tensor = torch.ops.aten._weight_int8pack_mm(x.contiguous(), self.values, one)
        return out

    def _many(self, x: Tensor) -> Tensor:
        if x.is_cuda:
            return F.linear(x, self.values.to(x.dtype))
        outputs, inputs = self.values.shape
        out = torch.empty(x.shape[0], outputs, dtype=x.dtype)
        for rows in row_blocks(outputs, inputs, x.device):
            out[:, rows] = F.linear(x, self.values[rows].to(x.dtype))
        return out
