"""Weights in panels of 32 outputs: the one layout decoding and prompts both read (linear.c)."""

# N outputs, K inputs, P panels

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.memory import zeroed
from model.quantization import QuantizedWeight
from model.schemes import AnyWeight

PANEL = 32
_LARGEST_GROUP = 128


class WeightStruct(ctypes.Structure):
    """Field for field the struct ``Weight`` of linear.c."""

    _fields_ = (
        ("panels", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
        ("bits", ctypes.c_int),
        ("inputs", ctypes.c_int),
        ("outputs", ctypes.c_int),
        ("group", ctypes.c_int),
    )


@dataclass(frozen=True)
class Panels:
    """A packed matrix [N, K]. ``order`` [K], if inputs are sorted: whose each column is."""

    inputs: int
    outputs: int
    bits: int  # 16 is bf16
    group: int  # inputs that share a scale; 0 for bf16
    data: Tensor
    scales: Tensor | None = None
    zeros: Tensor | None = None
    order: Tensor | None = None

    def struct(self) -> WeightStruct:
        return WeightStruct(
            self.data.data_ptr(),
            None if self.scales is None else self.scales.data_ptr(),
            None if self.zeros is None else self.zeros.data_ptr(),
            self.bits,
            self.inputs,
            self.outputs,
            self.group,
        )

    def rows(self, numbers: Tensor) -> Tensor:
        """[n] -> [n, K] bf16: some outputs' weights as they were, for an embedding that is tied."""
        assert self.bits == 16, "integers are not what went in"
        panels = self.data.view(-1, self.inputs // 2, PANEL, 2)
        return panels[numbers // PANEL, :, numbers % PANEL].flatten(1)

    @property
    def num_bytes(self) -> int:
        tensors = (self.data, self.scales, self.zeros)
        return sum(each.numel() * each.element_size() for each in tensors if each is not None)


def can_pack(weight: AnyWeight) -> bool:
    """Integers in groups of whole vectors, or bf16 in pairs."""
    inputs = weight.shape[1]
    if isinstance(weight, QuantizedWeight):
        return weight.group % 16 == 0 and inputs % weight.group == 0
    return isinstance(weight, Tensor) and weight.dtype == torch.bfloat16 and inputs % 2 == 0


def pack(weight: AnyWeight) -> Panels:
    if isinstance(weight, QuantizedWeight):
        return _pack_integers(weight)
    assert isinstance(weight, Tensor), "neither bf16 nor integers"
    outputs, inputs = weight.shape
    padded = _pad_outputs(weight)
    panels = _settle(padded.view(-1, PANEL, inputs // 2, 2).transpose(1, 2))
    return Panels(inputs, outputs, 16, 0, panels)


def _pack_integers(weight: QuantizedWeight) -> Panels:
    weight = weight.in_groups(_group(weight.group))
    outputs, inputs = weight.shape
    values = _pad_outputs(weight.unpacked())
    if weight.bits == 8:
        panels = values.view(-1, PANEL, inputs // 4, 4).transpose(1, 2)
    else:
        low, high = values.view(-1, PANEL, inputs // 8, 2, 4).unbind(3)
        panels = (low | high << 4).transpose(1, 2)
    return Panels(
        inputs,
        outputs,
        weight.bits,
        weight.group,
        _settle(panels),
        _by_panel(weight.scales.float()),
        None if weight.zeros is None else _by_panel(weight.zeros),
        weight.order,
    )


def _group(group: int) -> int:
    """Inputs are rounded to 8 bits a group at a time: not too many of them together."""
    if group <= _LARGEST_GROUP:
        return group
    return next((fit for fit in (128, 64, 32, 16) if group % fit == 0), group)


def _by_panel(groups: Tensor) -> Tensor:
    """[N, groups] -> [P, groups, 32]."""
    padded = _pad_outputs(groups)
    return _settle(padded.view(-1, PANEL, padded.size(1)).transpose(1, 2))


def _pad_outputs(x: Tensor) -> Tensor:
    missing = -x.size(0) % PANEL
    return F.pad(x, (0, 0, 0, missing)).contiguous() if missing else x.contiguous()


def _settle(x: Tensor) -> Tensor:
    """A contiguous copy in huge pages where the system has them: a step reads all of it."""
    return zeroed(x.shape, x.dtype).copy_(x)
