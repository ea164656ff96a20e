"""The pieces of a decoder layer: linear layers that know their parts, RMSNorm, the embedding."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.adapters import AdapterRows, AdapterSlots
from model.lora import LowRank
from model.parallel import ParallelGroup
from model.products import multiply_widened
from model.schemes import (
    AnyWeight,
    Quantized,
    dense,
    in_words,
    kept_as,
    some_inputs,
    some_outputs,
    stacked,
)


@dataclass(frozen=True)
class WeightSlot:
    """A tensor of the checkpoint: its whole shape, and what stores (this rank's share of) it."""

    shape: tuple[int, ...]
    store: Callable[[AnyWeight], None]

    def fill(self, tensor: AnyWeight) -> None:
        """Any dtype and device, dense or quantized; cast and copied."""
        assert tuple(tensor.shape) == self.shape, f"{tuple(tensor.shape)} for {self.shape}"
        self.store(tensor)


class Packed(Protocol):
    """A weight in a layout some library or kernel multiplies."""

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor: ...


class Linear(nn.Module):
    """x @ weight.T + bias over one or several parts stacked into one weight (q, k and v; gate, up).

    Column-sharded: every rank holds a slice of each part's outputs. Row-sharded (``by_rows``): a
    slice of the inputs, and the ranks' results are summed. The weight is dense or, after its parts
    came or were made quantized (``scheme``), ``quantized``; ``pack`` may re-lay either.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        inputs: int,
        parts: Sequence[int],
        *,
        has_bias: bool = False,
        dtype: torch.dtype,
        device: torch.device,
        group: ParallelGroup,
        by_rows: bool = False,
    ) -> None:
        super().__init__()
        self.inputs, self.parts = inputs, tuple(parts)
        self.group, self.by_rows = group, by_rows
        self.target = device
        local = sum(parts) if by_rows else sum(map(group.share, parts))
        width = group.share(inputs) if by_rows else inputs
        self.register_buffer("weight", torch.empty(local, width, dtype=dtype, device="meta"))
        has_bias = has_bias and not (by_rows and group.rank)  # it is added once
        bias = torch.empty(local, dtype=dtype, device="meta") if has_bias else None
        self.register_buffer("bias", bias)
        self.scheme = "auto"  # one of schemes.SCHEMES; set before the weight is filled
        self.quantized: Quantized | None = None
        self.packed: Packed | None = None
        self.quantized_as = ""  # in words; empty where the weight is dense
        self._quantized_bytes = 0
        self._quantized_parts: dict[int, Quantized] = {}
        self.adapters: AdapterSlots | None = None

    def forward(self, x: Tensor, adapters: AdapterRows | None = None) -> Tensor:
        """``adapters``: those of the step's rows; None where no row has one."""
        if self.packed is not None:
            out = self.packed.multiply(x, self.bias)
        elif self.quantized is not None:
            out = multiply_widened(x, self.quantized, self.bias)
        else:
            out = F.linear(x, self.weight, self.bias)
        if adapters is not None:
            self.add_adapters(x, out, adapters)
        return self.group.all_reduce(out) if self.by_rows and self.group.size > 1 else out

    def add_adapters(
        self, x: Tensor, out: Tensor, adapters: AdapterRows, norm: RMSNorm | None = None
    ) -> None:
        """out += what the rows' adapters make of x, in place; before ranks are summed.

        With ``norm`` x is what comes before it. Other rows of ``out`` are not touched.
        """
        if self.adapters is not None and self.adapters.adds_to(adapters):
            self.adapters.add(x, out, adapters, norm)

    def make_adapter_slots(self, num_slots: int, max_rank: int, dtype: torch.dtype) -> None:
        """Column-sharded, a rank holds every ``down`` and its share of ``up``; by rows, a share of
        ``down`` and every ``up``: the sum over the ranks is then the whole.
        """
        is_shared = not self.by_rows
        parts = [self.group.share(size) for size in self.parts] if is_shared else self.parts
        inputs = self.inputs if is_shared else self.group.share(self.inputs)
        self.adapters = AdapterSlots(num_slots, max_rank, inputs, parts, dtype, self.target)

    def fill_adapter_slot(self, slot: int, weights: Mapping[int, LowRank]) -> None:
        """``weights`` by part, whole; none empties the slot."""
        assert self.adapters is not None, "no slots were made"
        shares = {part: self._adapter_share(part, one) for part, one in weights.items()}
        self.adapters.fill(slot, shares)

    def _adapter_share(self, part: int, one: LowRank) -> LowRank:
        if self.by_rows:
            width = self.group.share(self.inputs)
            return LowRank(one.down.narrow(1, self.group.rank * width, width), one.up)
        size = self.group.share(self.parts[part])
        return LowRank(one.down, one.up.narrow(1, self.group.rank * size, size))

    def slots(self, names: Sequence[str], has_bias: bool) -> dict[str, WeightSlot]:
        """``names`` of the parts, in order; ``.weight`` and ``.bias`` are appended."""
        found = {}
        for part, name in enumerate(names):
            size = self.parts[part]
            weight = WeightSlot((size, self.inputs), partial(self._fill_weight, part))
            found[f"{name}.weight"] = weight
            if has_bias:
                found[f"{name}.bias"] = WeightSlot((size,), partial(self._fill_bias, part))
        return found

    def _fill_weight(self, part: int, weight: AnyWeight) -> None:
        """Quantized parts wait for each other; one dense part makes all of them dense."""
        weight = self.kept(self._share(part, weight))
        if isinstance(weight, Tensor) or not self.weight.is_meta:
            self._fill_dense({part: weight, **self._quantized_parts})
            return
        self._quantized_parts[part] = weight.to(self.target)
        if len(self._quantized_parts) == len(self.parts):
            self._stack()

    def kept(self, weight: AnyWeight) -> AnyWeight:
        """What ``scheme`` makes of a weight on its way in."""
        return kept_as(weight, self.scheme, self.weight.dtype, self.target)

    def _fill_dense(self, parts: dict[int, AnyWeight]) -> None:
        self._quantized_parts = {}
        if self.weight.is_meta:
            self.weight = torch.empty(
                self.weight.shape, dtype=self.weight.dtype, device=self.target
            )
        for part, weight in parts.items():
            self._rows(self.weight, part).copy_(dense(weight, self.weight.dtype))

    def _stack(self) -> None:
        parts, self._quantized_parts = self._quantized_parts, {}
        whole = stacked([parts[part] for part in range(len(self.parts))])
        if whole is None:
            self._fill_dense(dict(parts))
            return
        self.quantized, self.packed = whole, None
        self.quantized_as, self._quantized_bytes = in_words(whole), whole.num_bytes

    def _fill_bias(self, part: int, tensor: AnyWeight) -> None:
        tensor = dense(tensor)
        if self.bias is None:  # another rank adds it
            return
        if self.bias.is_meta:
            self.bias = torch.empty(self.bias.shape, dtype=self.bias.dtype, device=self.target)
        share = tensor if self.by_rows else dense(self._share(part, tensor))
        self._rows(self.bias, part).copy_(share)

    def _share(self, part: int, weight: AnyWeight) -> AnyWeight:
        if self.group.size == 1:
            return weight
        if self.by_rows:
            width = self.group.share(self.inputs)
            return some_inputs(weight, self.group.rank * width, width)
        size = self.group.share(self.parts[part])
        return some_outputs(weight, self.group.rank * size, size)

    def _rows(self, stacked: Tensor, part: int) -> Tensor:
        """Where a part lies in the stacked tensor of this rank."""
        sizes = self.parts if self.by_rows else [self.group.share(size) for size in self.parts]
        return stacked.narrow(0, sum(sizes[:part]), sizes[part])

    @property
    def held(self) -> AnyWeight:
        """The weight before packing."""
        return self.weight if self.quantized is None else self.quantized

    def pack(self, packer: Callable[[AnyWeight], Packed | None]) -> None:
        """Re-lays the weight, dense or quantized, where ``packer`` can; the source is dropped."""
        held = self.held
        if isinstance(held, Tensor) and held.is_meta:  # packed already: it is shared
            return
        self.packed = packer(held)
        if self.packed is None:
            return
        self.quantized = None
        self.weight = torch.empty(self.weight.shape, dtype=self.weight.dtype, device="meta")

    def widen_if_slow(self) -> None:
        """Makes a weight that came quantized and has no fast product dense, in bf16 on a CPU.

        Widening it for every product costs five dense products of one row; in float32 it is not
        worth the memory, and where a scheme was asked for the memory counts.
        """
        is_slow = self.weight.dtype == torch.bfloat16 and self.target.type == "cpu"
        if self.scheme == "auto" and is_slow:
            self.widen()

    def widen(self) -> None:
        """Makes a quantized weight dense."""
        if self.quantized is not None:
            self.weight, self.quantized = self.quantized.dequantize(self.weight.dtype), None
            self.quantized_as, self._quantized_bytes = "", 0

    @property
    def num_bytes(self) -> int:
        """What weight and bias take on this rank, in the layout they were filled with."""
        weight = self._quantized_bytes or self.weight.numel() * self.weight.element_size()
        bias = 0 if self.bias is None else self.bias.numel() * self.bias.element_size()
        return weight + bias


class Projection(NamedTuple):
    """One of the network's linear layers as its checkpoint names it: a part of one of ours."""

    linear: Linear
    part: int

    @property
    def shape(self) -> tuple[int, int]:
        """Of its weight, all ranks together."""
        return self.linear.parts[self.part], self.linear.inputs


def projections_of(linear: Linear, names: Sequence[str]) -> dict[str, Projection]:
    return {name: Projection(linear, part) for part, name in enumerate(names)}


@dataclass(frozen=True)
class OneDnnWeight:
    """A weight re-laid by oneDNN for its own products."""

    blocks: Tensor

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.blocks, bias, "none", [], "")
        return out


def pack_for_onednn(weight: AnyWeight) -> OneDnnWeight | None:
    if not isinstance(weight, Tensor) or not can_pack(weight):
        return None
    return OneDnnWeight(torch.ops.mkldnn._reorder_linear_weight(weight, None))


def can_pack(weight: Tensor) -> bool:
    """bfloat16 on a CPU whose oneDNN multiplies it; private operators, so asked for by name."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and bool(torch._C._has_mkldnn)
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, computed in float32 and rounded once.

    On a CPU PyTorch's own rms_norm computes bf16 in pieces: at 512 rows of 576 it takes 1,319 us,
    what stands here 124, and 13 to 10 at one row.
    """

    weight: Tensor

    def __init__(self, size: int, eps: float, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.eps, self.target = eps, device
        self.shape = (size,)
        self.register_buffer("weight", torch.empty(size, dtype=dtype, device="meta"))
        self._wide: Tensor | None = None  # the weight in float32, on a CPU
        self._eps = torch.tensor(eps)

    def forward(self, x: Tensor) -> Tensor:
        if self._wide is None:
            return F.rms_norm(x, self.shape, self.weight, self.eps)
        wide = x.float()
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = torch.addcmul(self._eps, norm, norm, value=1 / self.shape[0]).rsqrt_()
        return (wide * scale).mul_(self._wide).to(x.dtype)

    def slot(self) -> WeightSlot:
        return WeightSlot(self.shape, self._fill)

    def _fill(self, tensor: AnyWeight) -> None:
        self.weight = dense(tensor, self.weight.dtype).to(
            self.target, self.weight.dtype, copy=isinstance(tensor, Tensor)
        )
        self._wide = self.weight.float() if self.target.type == "cpu" else None


class Embedding(nn.Module):
    """Token ids to rows of a table; whole on every rank."""

    weight: Tensor

    def __init__(self, rows: int, size: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.target = device
        self.register_buffer("weight", torch.empty(rows, size, dtype=dtype, device="meta"))
        self._look_up: Callable[[Tensor], Tensor] | None = None

    def forward(self, tokens: Tensor) -> Tensor:
        if self._look_up is not None:
            return self._look_up(tokens)
        return F.embedding(tokens, self.weight)

    def look_up_in(self, rows: Callable[[Tensor], Tensor]) -> None:
        """``rows`` holds the same table in another layout: this one is dropped."""
        self._look_up = rows
        self.weight = torch.empty(self.weight.shape, dtype=self.weight.dtype, device="meta")

    def slot(self) -> WeightSlot:
        return WeightSlot(tuple(self.weight.shape), self._fill)

    def _fill(self, tensor: AnyWeight) -> None:
        self.weight = dense(tensor, self.weight.dtype).to(
            self.target, self.weight.dtype, copy=isinstance(tensor, Tensor)
        )
