"""The compiled way to add adapters to a few rows, called through ctypes.

``LoraKernel`` computes what ``AdapterSlots`` computes run by run in PyTorch, for all rows of
a step in one call; the tests hold one to the other.
"""

from __future__ import annotations

import ctypes
import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from model.kernels import kernel_library

if TYPE_CHECKING:
    from model.adapters import AdapterRows, AdapterSlots, Norm

MAX_PARTS = 3

_pointer, _int = ctypes.c_void_p, ctypes.c_int


class _Adapters(ctypes.Structure):
    """Field for field the struct ``Adapters`` of lora.c."""

    _fields_ = (
        ("down", _pointer),
        ("up", _pointer),
        ("slots", _pointer),
        ("hidden", _pointer),
        ("normed", _pointer),
        ("borders", ctypes.c_int32 * (MAX_PARTS + 1)),
        ("parts", _int),
        ("max_rank", _int),
        ("inputs", _int),
        ("outputs", _int),
        ("threads", _int),
        ("clears", _int),
        ("eps", ctypes.c_float),
        ("x", _pointer),
        ("norm", _pointer),
        ("out", _pointer),
    )


class Scratch:
    """What all layers take turns with; its contents mean nothing between two calls."""

    def __init__(self) -> None:
        self.hidden = torch.empty(0)
        self.normed = torch.empty(0, dtype=torch.bfloat16)

    def reserve(self, hidden: int, normed: int) -> tuple[Tensor, Tensor]:
        if self.hidden.numel() < hidden:
            self.hidden = torch.empty(hidden)
        if self.normed.numel() < normed:
            self.normed = torch.empty(normed, dtype=torch.bfloat16)
        return self.hidden, self.normed


class PreparedAdapters:
    """What one layer's adapters add, between two buffers: prepared once, called step by step.

    x [T, K] and out [T, N] of bf16, contiguous, for as many tokens as a step may have. With
    ``norm`` x is what comes before it; with ``clears`` out is what is added alone, else zeros.
    """

    def __init__(
        self,
        kernel: LoraKernel,
        x: Tensor,
        out: Tensor,
        norm: Norm | None = None,
        *,
        clears: bool = False,
    ) -> None:
        assert x.is_contiguous(), "rows lie side by side"
        assert out.is_contiguous(), "rows lie side by side"
        slots, scratch = kernel.slots, kernel.scratch
        inputs, wide = slots.down.size(2), slots.down.size(1)
        hidden, normed = scratch.reserve(x.size(0) * wide, x.size(0) * inputs)
        weight = None if norm is None else norm.weight
        self._kept = (x, out, hidden, normed, weight)  # whose addresses are below
        self._call = _Adapters(
            slots.down.data_ptr(),
            slots.up.data_ptr(),
            slots.held_on_device.data_ptr(),
            hidden.data_ptr(),
            normed.data_ptr(),
            (ctypes.c_int32 * (MAX_PARTS + 1))(*slots.borders),
            len(slots.parts),
            slots.up.size(1),
            inputs,
            slots.up.size(2),
            kernel.threads,
            clears,
            0.0 if norm is None else norm.eps,
            x.data_ptr(),
            None if weight is None else weight.data_ptr(),
            out.data_ptr(),
        )
        self._address = ctypes.byref(self._call)
        self._slots, self._function = slots, kernel.function

    def __call__(self, num_tokens: int, rows: AdapterRows) -> bool:
        """False, and nothing done, where none of the rows' adapters adapts this layer."""
        if self._slots.filled.isdisjoint(rows.present):
            return False
        self._function(self._address, rows.table_address, rows.table_rows, num_tokens)
        return True


class LoraKernel:
    """``add_adapters`` of lora.c over the slots of one layer."""

    def __init__(
        self, library: ctypes.CDLL, scratch: Scratch, slots: AdapterSlots, threads: int
    ) -> None:
        self.function, self.scratch = library.add_adapters, scratch
        self.slots, self.threads = slots, threads

    def add(self, x: Tensor, out: Tensor, rows: AdapterRows, norm: Norm | None = None) -> None:
        """out [T, N] += what the rows' adapters make of x [T, K], or of its norm."""
        PreparedAdapters(self, x, out, norm)(x.size(0), rows)


@functools.cache
def _library() -> tuple[ctypes.CDLL, Scratch] | None:
    library = kernel_library()
    function = getattr(library, "add_adapters", None)
    if library is None or function is None:
        return None
    function.argtypes = [ctypes.POINTER(_Adapters), _pointer, _int, _int]
    function.restype = None
    return library, Scratch()


def lora_kernel(slots: AdapterSlots, threads: int) -> LoraKernel | None:
    """None where the library was not built, or not for this processor."""
    found = _library()
    return None if found is None else LoraKernel(*found, slots, threads)
