"""One step's rows as tensors: what to compute, where keys go, which logits are wanted."""

# T tokens, S rows (sequences), B pages of the widest table, R rows of logits

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model.adapters import AdapterRows, Run, runs_of, token_slots

KNOWN = -1  # the row's tokens are on the host


Array: TypeAlias = npt.NDArray[Any]  # of integers


@dataclass(slots=True)
class BatchRow:
    """Tokens of one sequence from position ``start`` on; the keys before it are in the cache.

    ``num_logits`` last tokens want logits: 0 for a prompt chunk that samples nothing, 1 to sample.
    ``drawn_at`` is the place of its one token among those drawn last, where only the device knows
    it; ``tokens`` holds any valid id then.
    ``adapter`` is the slot of the adapter they go through; rows of one slot stand side by side.
    """

    tokens: list[int]
    start: int
    block_table: list[int]
    num_logits: int = 0
    adapter: int | None = None
    drawn_at: int = KNOWN


@dataclass(slots=True)
class Batch:
    """Rows of one token come first (``num_decodes`` of them). The lists spare synchronisation."""

    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    slot_blocks: Tensor  # [T] int64: the page each token's key goes to
    slot_offsets: Tensor  # [T] int64: and its place in it
    query_starts: Tensor  # [S + 1] int32
    context_lengths: Tensor  # [S] int32: keys visible to a row's last token, this step's included
    block_tables: Tensor  # [S, B] int32
    logit_rows: Tensor  # [R] int64
    num_decodes: int
    query_lengths: list[int]
    contexts: list[int]
    tables: list[list[int]]  # each row's pages, as many as its context fills
    block_size: int
    adapters: AdapterRows | None = None  # None where no row has one
    # What a cache or an attention backend works out once a step and reads in every layer.
    prepared: dict[Any, Any] = field(default_factory=dict)
    # An attention backend's, of a batch that a CUDA graph is captured over: made before that.
    fixed_plans: object | None = None

    @property
    def num_tokens(self) -> int:
        return self.token_ids.size(0)

    @property
    def num_logits(self) -> int:
        return self.logit_rows.size(0)


class BatchBuilder:
    """Lays rows out in buffers allocated once; a batch is views of them, valid until the next one.

    To a device goes one copy a step, from pinned memory.
    """

    def __init__(
        self,
        max_tokens: int,
        max_rows: int,
        max_blocks: int,
        block_size: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.max_tokens, self.max_rows, self.max_blocks = max_tokens, max_rows, max_blocks
        self.block_size = block_size
        self.device = torch.device(device)
        self._staging = [_Buffers(self, torch.device("cpu"))]
        self._buffers = self._staging[0]
        if self.device.type == "cuda":
            # Two, so that one can be written while the other's copy is still under way.
            self._staging.append(_Buffers(self, torch.device("cpu")))
            self._buffers = _Buffers(self, self.device)

    def build(self, rows: list[BatchRow], drawn: Tensor | None = None) -> Batch:
        """Rows of one token first, longer ones after them; ``drawn`` [n] is what feeds some."""
        lengths = [len(row.tokens) for row in rows]
        num_decodes = next((i for i, n in enumerate(lengths) if n != 1), len(rows))
        assert all(n > 1 for n in lengths[num_decodes:]), "rows of one token come first"
        assert 0 < sum(lengths) <= self.max_tokens, f"{sum(lengths)} tokens"
        assert all(row.num_logits <= n for row, n in zip(rows, lengths, strict=True))
        assert 0 < len(rows) <= self.max_rows, f"{len(rows)} rows"
        contexts = [row.start + n for row, n in zip(rows, lengths, strict=True)]
        tables = [
            row.block_table[: -(-context // self.block_size)]
            for row, context in zip(rows, contexts, strict=True)
        ]
        assert max(map(len, tables)) <= self.max_blocks, "a block table is too long"
        batch = self._batch(rows, lengths, contexts, tables, num_decodes)
        if drawn is not None:
            self._buffers.feed(batch.token_ids[:num_decodes], drawn)
        return batch

    def _batch(
        self,
        rows: list[BatchRow],
        lengths: list[int],
        contexts: list[int],
        tables: list[list[int]],
        num_decodes: int,
    ) -> Batch:
        staging = self._staging[0]
        self._staging.append(self._staging.pop(0))
        staging.wait()
        runs = runs_of([row.adapter for row in rows], lengths)
        num_logits = staging.write(rows, lengths, contexts, tables, runs)
        if staging is not self._buffers:
            self._buffers.copy_from(staging)
        return self._buffers.batch(
            sum(lengths),
            len(rows),
            max(map(len, tables)),
            num_logits,
            num_decodes=num_decodes,
            query_lengths=lengths,
            contexts=contexts,
            tables=tables,
            block_size=self.block_size,
            adapters=self._adapters(runs, sum(lengths)),
        )

    def _adapters(self, runs: list[Run], num_tokens: int) -> AdapterRows | None:
        return AdapterRows(runs, self._buffers.adapters[:num_tokens]) if runs else None


class _Buffers:
    """Every tensor of a batch at its largest, in one storage."""

    def __init__(self, sizes: BatchBuilder, device: torch.device) -> None:
        tokens, rows = sizes.max_tokens, sizes.max_rows
        self.block_size = sizes.block_size
        self.copied: torch.cuda.Event | None = None
        wide = 5 * tokens  # five int64 a token, then the int32 ones, two to a place
        narrow = 3 * rows + 1 + rows * sizes.max_blocks + tokens
        self.storage = torch.zeros(
            wide + (narrow + 1) // 2,
            dtype=torch.int64,
            device=device,
            pin_memory=device.type == "cpu" and sizes.device.type == "cuda",
        )
        self.tokens, self.positions, self.blocks, self.offsets, self.logits = (
            self.storage[:wide].view(5, tokens).unbind()
        )
        small = self.storage[wide:].view(torch.int32)
        self.starts, self.contexts = small[: rows + 1], small[rows + 1 : 2 * rows + 1]
        self.drawn_at = small[2 * rows + 1 : 3 * rows + 1]
        self.tables = small[3 * rows + 1 : narrow - tokens]
        self.adapters = small[narrow - tokens : narrow]

    def wait(self) -> None:
        """Until the device has read what was written here last."""
        if self.copied is not None:
            self.copied.synchronize()

    def write(
        self,
        rows: list[BatchRow],
        lengths: list[int],
        contexts: list[int],
        tables: list[list[int]],
        runs: list[Run],
    ) -> int:
        """Fills the buffers and returns how many logits are wanted."""
        ends = np.cumsum(lengths)
        if runs:
            _put(self.adapters, token_slots(runs, sum(lengths)))
        _put(self.tokens, [token for row in rows for token in row.tokens])
        _put(self.starts, [0, *ends])
        _put(self.contexts, contexts)
        _put(self.drawn_at, [row.drawn_at for row in rows])
        widest = max(map(len, tables))
        padded = np.array([table + [0] * (widest - len(table)) for table in tables], np.int32)
        _put(self.tables, padded.ravel())
        self._write_slots(padded, np.array(lengths), np.array(contexts), ends)
        return self._write_logits([row.num_logits for row in rows], ends)

    def _write_slots(self, tables: Array, lengths: Array, contexts: Array, ends: Array) -> None:
        row_of_token = np.repeat(np.arange(len(lengths)), lengths)
        positions = np.arange(len(row_of_token)) + (contexts - ends)[row_of_token]
        places, offsets = np.divmod(positions, self.block_size)
        _put(self.positions, positions)
        _put(self.blocks, tables[row_of_token, places])
        _put(self.offsets, offsets)

    def _write_logits(self, counts: list[int], ends: Array) -> int:
        """The last so many tokens of every row."""
        wanted = np.cumsum(counts)
        total = int(wanted[-1])
        _put(self.logits, np.arange(total) + np.repeat(ends - wanted, counts))
        return total

    def copy_from(self, staging: _Buffers) -> None:
        self.storage.copy_(staging.storage, non_blocking=True)
        if staging.copied is None:
            staging.copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        staging.copied.record()

    def feed(self, tokens: Tensor, drawn: Tensor) -> None:
        """Into the rows of one token, those that say from where; the host waits for nothing."""
        places = self.drawn_at[: tokens.size(0)]
        fed = drawn.index_select(0, places.clamp(min=0))
        tokens.copy_(torch.where(places == KNOWN, tokens, fed))

    def batch(self, tokens: int, rows: int, widest: int, logits: int, **lists: Any) -> Batch:
        return Batch(
            token_ids=self.tokens[:tokens],
            positions=self.positions[:tokens],
            slot_blocks=self.blocks[:tokens],
            slot_offsets=self.offsets[:tokens],
            query_starts=self.starts[: rows + 1],
            context_lengths=self.contexts[:rows],
            block_tables=self.tables[: rows * widest].view(rows, widest),
            logit_rows=self.logits[:logits],
            **lists,
        )


def _put(place: Tensor, numbers: Array | list[int]) -> None:
    """At the front of a buffer on the host."""
    place.numpy()[: len(numbers)] = numbers
