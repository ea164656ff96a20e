"""Adapters at work: slots beside each linear layer, and what a step's rows add from them.

A network has as many slots as different adapters may share one step. A slot holds one adapter's
matrices for every linear layer, in memory taken once (CUDA graphs need fixed addresses); a batch
says which of its tokens go through which slot. Tokens without an adapter are never touched: their
rows are the same bits as without any of this.
"""

# T tokens, K inputs, N outputs, P parts stacked in one layer (q, k, v), R the largest rank, r a
# slot's own, S slots

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from model.lora import LowRank

if TYPE_CHECKING:
    from model.kernels.lora import LoraKernel, PreparedAdapters

LONG_RUN = 32  # tokens; past it a matrix product on a GPU is the faster way


class Norm(Protocol):
    """An RMSNorm; kernels compute it by themselves."""

    weight: Tensor
    eps: float

    def __call__(self, x: Tensor, /) -> Tensor: ...


class Run(NamedTuple):
    """Neighbouring tokens ``first <= token < end`` that go through one slot."""

    slot: int
    first: int
    end: int


class AdapterRows:
    """Which tokens of a batch go through which slot; the tokens between its runs through none."""

    def __init__(
        self, runs: Sequence[Run], slots: Tensor | None = None, *, is_any: bool = False
    ) -> None:
        """``slots``: [T] int32, each token's slot, -1 where it goes through no short run.

        ``is_any``: whatever ``slots`` come to hold, as in a CUDA graph; the runs tell nothing.
        """
        self.runs = runs
        self.slots = slots
        self.is_any = is_any
        self.long = [run for run in runs if run.end - run.first > LONG_RUN]
        self.short = [run for run in runs if run.end - run.first <= LONG_RUN]
        self.present = {run.slot for run in runs}
        self.table_rows = 0
        self._table: Tensor | None = None

    @property
    def table_address(self) -> int:
        """Of [table_rows, 3] int32 on the host: slot, first token, end; long runs in pieces."""
        if self._table is None:
            pieces = [
                Run(slot, start, min(start + LONG_RUN, end))
                for slot, first, end in self.runs
                for start in range(first, end, LONG_RUN)
            ]
            self._table = torch.tensor(pieces, dtype=torch.int32)
            self.table_rows = len(pieces)
        return self._table.data_ptr()


def runs_of(slots: Sequence[int | None], lengths: Sequence[int]) -> list[Run]:
    """Neighbouring rows of one slot are one run, but no run is long unless one row of it is."""
    runs: list[Run] = []
    start = 0
    for slot, length in zip(slots, lengths, strict=True):
        last = runs[-1] if runs else None
        if slot is not None:
            joins = last is not None and (last.slot, last.end) == (slot, start)
            if joins and last is not None and start + length - last.first <= LONG_RUN:
                runs[-1] = Run(slot, last.first, start + length)
            else:
                runs.append(Run(slot, start, start + length))
        start += length
    return runs


def token_slots(runs: Sequence[Run], num_tokens: int) -> list[int]:
    """Each token's slot; -1 for those of long runs, which go their own way, and of none."""
    slots = [-1] * num_tokens
    for slot, first, end in runs:
        if end - first <= LONG_RUN:
            slots[first:end] = [slot] * (end - first)
    return slots


class AdapterSlots:
    """The slots of one linear layer, on its device. ``parts`` are the outputs this rank holds.

    A slot of rank r keeps part p's ``down`` in rows p r to (p + 1) r, its ``up`` in the first r
    rows of p's columns: adapters of less than the largest rank cost no more than they are.
    """

    def __init__(
        self,
        num_slots: int,
        max_rank: int,
        inputs: int,
        parts: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        outputs = sum(parts)
        self.down = torch.empty(
            num_slots, len(parts) * max_rank, inputs, dtype=dtype, device=device
        )
        self.up = torch.empty(num_slots, max_rank, outputs, dtype=dtype, device=device)
        self.parts = tuple(parts)
        self.borders = (0, *itertools.accumulate(parts))
        self.ranks = [0] * num_slots  # 0: the slot holds nothing for this layer
        self.filled: frozenset[int] = frozenset()  # the other slots
        self.held: list[tuple[int, ...]] = [()] * num_slots  # parts its adapter has
        self.held_on_device = torch.zeros(
            num_slots, 1 + len(parts), dtype=torch.int32, device=device
        )
        self._by_token = _by_token(device)
        self._kernel = _kernel(self)

    def fill(self, slot: int, weights: Mapping[int, LowRank]) -> None:
        """``weights`` by part: this rank's shares. What the slot held before is gone."""
        rank = max((one.rank for one in weights.values()), default=0)
        self.ranks[slot], self.held[slot] = rank, tuple(sorted(weights))
        self.filled = frozenset(slot for slot, rank in enumerate(self.ranks) if rank)
        is_held = [int(part in weights) for part in range(len(self.parts))]
        self.held_on_device[slot].copy_(
            torch.tensor([rank, *is_held], dtype=torch.int32), non_blocking=True
        )
        for part, one in weights.items():
            down = self.down[slot, part * rank : (part + 1) * rank]
            up = self.up[slot, :rank, self.borders[part] : self.borders[part + 1]]
            _copy(down, one.down)
            _copy(up, one.up)

    def adds_to(self, rows: AdapterRows) -> bool:
        """Whether any of the rows' adapters adapts this layer at all."""
        return rows.is_any or not self.filled.isdisjoint(rows.present)

    @property
    def serves_by_token(self) -> bool:
        """Whether short runs are the device's own affair, so that a CUDA graph can hold them."""
        return self._by_token is not None

    def add(self, x: Tensor, out: Tensor, rows: AdapterRows, norm: Norm | None = None) -> None:
        """out [T, N] += what each token's adapter makes of x [T, K], or of its norm; in place."""
        runs = rows.runs
        if self._kernel is not None:
            self._kernel.add(x, out, rows, norm)
            return
        if self._by_token is not None:
            if rows.short or rows.is_any:
                self._by_token(x if norm is None else norm(x), out, rows, self)
            runs = rows.long
        for run in runs:
            if self.ranks[run.slot]:
                own = x[run.first : run.end]
                own = own if norm is None else norm(own)
                self._add_run(own, out[run.first : run.end], run.slot)

    def prepare(
        self, x: Tensor, out: Tensor, norm: Norm | None = None, *, clears: bool = False
    ) -> PreparedAdapters:
        """``add`` between two buffers that stay where they are, where the compiled kernel is."""
        from model.kernels.lora import PreparedAdapters

        assert self._kernel is not None, "kernels are there, or no plan is made"
        return PreparedAdapters(self._kernel, x, out, norm, clears=clears)

    def _add_run(self, x: Tensor, out: Tensor, slot: int) -> None:
        rank, held = self.ranks[slot], self.held[slot]
        first, end = held[0], held[-1] + 1
        hidden = x @ self.down[slot, first * rank : end * rank].t()
        for part in held:
            columns = slice(self.borders[part], self.borders[part + 1])
            own = hidden[:, (part - first) * rank : (part - first + 1) * rank]
            out[:, columns].addmm_(own, self.up[slot, :rank, columns])


def _copy(place: Tensor, source: Tensor) -> None:
    """Into the first rows; a part of lower rank than its neighbours is filled up with zeros."""
    rows = source.size(0)
    place[:rows].copy_(source, non_blocking=True)
    place[rows:].zero_()


ByToken: TypeAlias = Callable[[Tensor, Tensor, AdapterRows, AdapterSlots], None]


def _by_token(device: torch.device) -> ByToken | None:
    """The Triton kernels, which serve all short runs in one go."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    from model.adapters_triton import add_by_token

    return add_by_token


def _kernel(slots: AdapterSlots) -> LoraKernel | None:
    """The compiled one, likewise."""
    if slots.down.device.type != "cpu" or slots.down.dtype != torch.bfloat16:
        return None
    from model.kernels.lora import lora_kernel

    return lora_kernel(slots, torch.get_num_threads())
