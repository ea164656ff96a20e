"""One step's rows as tensors: views of buffers that are allocated once."""

# T tokens, S rows, B blocks a row, R wanted logits

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True)
class BatchRow:
    """What one sequence computes in a step. Keys 0..start-1 are in the cache already."""

    tokens: list[int]
    start: int  # position of tokens[0]
    block_table: list[int]
    num_logits: int = 1  # of the last tokens: 0 samples nothing, len(tokens) for prompt logprobs


@dataclass(slots=True)
class Batch:
    """Rows of one token (decodes) come first. The lists stay on the host: no synchronisation."""

    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    slot_blocks: Tensor  # [T] int64, page each token's K and V go to
    slot_offsets: Tensor  # [T] int64, place in that page
    query_starts: Tensor  # [S + 1] int32
    context_lengths: Tensor  # [S] int32, keys visible with this step's
    block_tables: Tensor  # [S, B] int32
    logit_rows: Tensor  # [R] int64, rows of T
    num_decodes: int
    query_lengths: list[int]
    contexts: list[int]
    block_lists: list[list[int]]
    block_size: int

    @property
    def num_tokens(self) -> int:
        return self.token_ids.shape[0]

    def without_decodes(self) -> Batch:
        """The prompt chunks alone, where another path serves the decoding rows."""
        first = self.num_decodes
        return Batch(
            token_ids=self.token_ids[first:],
            positions=self.positions[first:],
            slot_blocks=self.slot_blocks[first:],
            slot_offsets=self.slot_offsets[first:],
            query_starts=self.query_starts[first:] - first,
            context_lengths=self.context_lengths[first:],
            block_tables=self.block_tables[first:],
            logit_rows=self.logit_rows,
            num_decodes=0,
            query_lengths=self.query_lengths[first:],
            contexts=self.contexts[first:],
            block_lists=self.block_lists[first:],
            block_size=self.block_size,
        )


class BatchBuilder:
    """Turns rows into a ``Batch``; asserts that rows of one token lead."""

    def __init__(
        self,
        max_tokens: int,
        max_rows: int,
        max_blocks: int,
        block_size: int,
        device: torch.device | str,
    ) -> None:
        self.block_size = block_size
        self.device = torch.device(device)
        pinned = self.device.type == "cuda"
        self._tokens = torch.empty(5, max_tokens, dtype=torch.int64, pin_memory=pinned)
        self._rows = torch.empty(2, max_rows + 1, dtype=torch.int32, pin_memory=pinned)
        self._tables = torch.zeros(max_rows, max_blocks, dtype=torch.int32, pin_memory=pinned)

    def build(self, rows: list[BatchRow]) -> Batch:
        """One copy of small integers to the device, whatever the number of rows."""
        counts = [len(row.tokens) for row in rows]
        contexts = [row.start + count for row, count in zip(rows, counts, strict=True)]
        num_decodes = _leading_ones(counts)
        assert all(count != 1 for count in counts[num_decodes:]), "rows of one token come first"
        total, wanted = sum(counts), self._fill_tokens(rows, counts)
        self._rows[0, : len(rows) + 1] = torch.tensor([0, *_running(counts)], dtype=torch.int32)
        self._rows[1, : len(rows)] = torch.tensor(contexts, dtype=torch.int32)
        width = self._fill_tables(rows)
        return Batch(
            token_ids=self._on_device(self._tokens[0, :total]),
            positions=self._on_device(self._tokens[1, :total]),
            slot_blocks=self._on_device(self._tokens[2, :total]),
            slot_offsets=self._on_device(self._tokens[3, :total]),
            query_starts=self._on_device(self._rows[0, : len(rows) + 1]),
            context_lengths=self._on_device(self._rows[1, : len(rows)]),
            block_tables=self._on_device(self._tables[: len(rows), :width].contiguous()),
            logit_rows=self._on_device(self._tokens[4, :wanted]),
            num_decodes=num_decodes,
            query_lengths=counts,
            contexts=contexts,
            block_lists=[row.block_table for row in rows],
            block_size=self.block_size,
        )

    def _on_device(self, tensor: Tensor) -> Tensor:
        return tensor if self.device.type == "cpu" else tensor.to(self.device, non_blocking=True)

    def _fill_tokens(self, rows: list[BatchRow], counts: list[int]) -> int:
        ids: list[int] = []
        positions: list[int] = []
        blocks: list[int] = []
        wanted: list[int] = []
        size = self.block_size
        for row, count in zip(rows, counts, strict=True):
            ids += row.tokens
            positions += range(row.start, row.start + count)
            blocks += [row.block_table[p // size] for p in range(row.start, row.start + count)]
            wanted += range(len(ids) - row.num_logits, len(ids))
        total = len(ids)
        self._tokens[:3, :total] = torch.tensor([ids, positions, blocks])
        torch.remainder(self._tokens[1, :total], size, out=self._tokens[3, :total])
        self._tokens[4, : len(wanted)] = torch.tensor(wanted, dtype=torch.int64)
        return len(wanted)

    def _fill_tables(self, rows: list[BatchRow]) -> int:
        width = max(len(row.block_table) for row in rows)
        padded = [row.block_table + [0] * (width - len(row.block_table)) for row in rows]
        self._tables[: len(rows), :width] = torch.tensor(padded, dtype=torch.int32)
        return width


def _leading_ones(counts: list[int]) -> int:
    return next((i for i, count in enumerate(counts) if count != 1), len(counts))


def _running(counts: list[int]) -> list[int]:
    sums, total = [], 0
    for count in counts:
        total += count
        sums.append(total)
    return sums
