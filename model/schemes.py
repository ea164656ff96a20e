"""What becomes of a weight on its way into a linear layer: the rules behind ``--quantization``.

``auto`` keeps what the checkpoint holds, ``none`` widens it, ``int8``, ``int4`` and ``fp8`` make it
so. Integers that are small enough already stay as they are: rounding twice only loses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from model.float8 import Float8Weight, quantize_float8
from model.float8 import stack as stack_float8
from model.quantization import QuantizedWeight, fitting_group, quantize
from model.quantization import stack as stack_integers

SCHEMES = ("auto", "none", "int8", "int4", "fp8")
BITS = {"int8": 8, "int4": 4}

Quantized: TypeAlias = QuantizedWeight | Float8Weight
AnyWeight: TypeAlias = Tensor | Quantized


def check_scheme(scheme: str, device: torch.device) -> None:
    """Raises ValueError with a line for the user."""
    if scheme not in SCHEMES:
        raise ValueError(f"quantization {scheme!r} is not known; known are {', '.join(SCHEMES)}")
    if scheme == "fp8" and device.type == "cpu":
        raise ValueError("processors do not multiply fp8: use int8 or int4 on a CPU")


def kept_as(weight: AnyWeight, scheme: str, dtype: torch.dtype, device: torch.device) -> AnyWeight:
    """What a layer of ``dtype`` on ``device`` holds. Dense where no group divides the inputs."""
    if isinstance(weight, Float8Weight) and device.type == "cpu":
        weight = weight.dequantize(dtype)
    if scheme == "auto":
        return weight
    if scheme == "none":
        return dense(weight, dtype)
    if scheme == "fp8":
        return weight if isinstance(weight, Float8Weight) else quantize_float8(_on(weight, device))
    bits = BITS[scheme]
    if isinstance(weight, QuantizedWeight) and weight.bits <= bits:
        return weight
    group = fitting_group(weight.shape[1], bits)
    return dense(weight, dtype) if group is None else quantize(_on(weight, device), bits, group)


def _on(weight: AnyWeight, device: torch.device) -> Tensor:
    return dense(weight).to(device)


def dense(weight: AnyWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """``weight`` itself where it is dense already, whatever its dtype."""
    return weight if isinstance(weight, Tensor) else weight.dequantize(dtype)


def some_outputs(weight: AnyWeight, start: int, count: int) -> AnyWeight:
    if isinstance(weight, QuantizedWeight):
        return weight.outputs(slice(start, start + count))
    if isinstance(weight, Float8Weight):
        return weight.outputs(start, count)
    return weight.narrow(0, start, count)


def some_inputs(weight: AnyWeight, start: int, count: int) -> AnyWeight:
    """Dense where the inputs were sorted: their groups lie anywhere."""
    if isinstance(weight, Tensor):
        return weight.narrow(1, start, count)
    part = weight.inputs(start, count)
    return dense(weight).narrow(1, start, count) if part is None else part


def stacked(parts: Sequence[Quantized]) -> Quantized | None:
    """One above the other; None where that cannot be said in one layout."""
    integers = [part for part in parts if isinstance(part, QuantizedWeight)]
    floats = [part for part in parts if isinstance(part, Float8Weight)]
    if integers and floats:
        return None
    return stack_integers(integers) if integers else stack_float8(floats)


def in_words(weight: Quantized) -> str:
    """For the banner."""
    if isinstance(weight, Float8Weight):
        tall, wide = weight.block
        if wide >= weight.shape[1]:
            return "fp8 weights, a scale an output"
        return f"fp8 weights, blocks of {tall} x {wide}"
    kind = f"int{weight.bits} weights"
    if weight.group == weight.shape[1]:
        return f"{kind}, a scale an output"
    return f"{kind}, groups of {weight.group}"
