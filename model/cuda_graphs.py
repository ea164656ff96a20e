"""Decode steps as CUDA graphs: one launch instead of some thousand.

A graph replays fixed kernels on fixed addresses. So the forward of a decode-only batch is captured
once for each bucket of rows, over buffers of this class's own; a step copies its few integers into
them, pads to the bucket, and replays. Padding rows read and write page 0, which nobody is given.
Where adapters may come, every bucket is captured a second time with them: which token goes through
which slot is one more tensor of integers. Whatever is not a plain decode step (prompt chunks, taps,
too many rows) runs eagerly.
"""

# R rows of the batch, B blocks a row, V vocabulary

from __future__ import annotations

import bisect
import logging
import time
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from model.adapters import AdapterRows
from model.attention_cuda import triton_available
from model.batch import Batch
from model.kv_cache import KVCache
from model.llama import Llama

if TYPE_CHECKING:
    from model.attention_flashinfer import DecodePlans

log = logging.getLogger(__name__)


class Bucket(NamedTuple):
    """What one graph was captured for."""

    rows: int
    has_adapters: bool


class DecodeGraphs:
    """``forward`` as ``Llama.forward`` over one cache, by graph where one was captured."""

    def __init__(self, model: Llama, cache: KVCache, max_rows: int, max_blocks: int) -> None:
        self._model, self._cache = model, cache
        self._graphs: dict[Bucket, torch.cuda.CUDAGraph] = {}
        self.buckets = buckets(max_rows)
        self._padded = PaddedDecodes(max_rows, max_blocks, cache.block_size, model.device)
        self._plans = self._make_plans(max_rows * max_blocks)
        # Outside the graphs' memory: what a graph gives out could not be shared with the others.
        self._logits = torch.empty(max_rows, model.config.vocab_size, device=model.device)

    @staticmethod
    def can_capture(model: Llama) -> bool:
        """Whether the launches of this model depend on shapes alone."""
        return model.device.type == "cuda" and (
            model.attention in ("triton", "flashinfer")
            or (model.attention == "varlen" and triton_available())
        )

    @torch.inference_mode()
    def capture(self) -> None:
        """All buckets, the largest first, so that the others fit in its memory. Seconds."""
        started = time.monotonic()
        pool = torch.cuda.graph_pool_handle()
        wanted = [Bucket(rows, False) for rows in reversed(self.buckets)]
        if self._model.serves_adapters_by_token:
            wanted += [Bucket(rows, True) for rows in reversed(self.buckets)]
        for bucket in wanted:
            self._model.forward(self._batch(bucket), self._cache)  # compiles kernels
            torch.cuda.synchronize()
            batch = self._batch(bucket)  # anew: what a batch prepares belongs in the graph
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                self._logits[: bucket.rows].copy_(self._model.forward(batch, self._cache))
            self._graphs[bucket] = graph
        log.info("captured %d decode graphs in %.1f s", len(wanted), time.monotonic() - started)

    def forward(self, batch: Batch) -> Tensor:
        """Logits [R, V] float32 of the batch's wanted rows."""
        bucket = self.bucket_of(batch)
        graph = None if bucket is None else self._graphs.get(bucket)
        if bucket is None or graph is None:
            return self._model.forward(batch, self._cache)
        self._padded.fill(batch, bucket.rows)
        if bucket.rows in self._plans:
            self._plans[bucket.rows].plan(batch.tables, batch.contexts)
        graph.replay()
        # The next step may be replayed before this one's draws are settled from its logits.
        return self._logits[: batch.num_decodes].clone()

    def bucket_of(self, batch: Batch) -> Bucket | None:
        """The smallest that holds the batch; None where it is not plain decoding."""
        rows = batch.num_decodes
        is_plain = rows == batch.num_tokens == batch.logit_rows.size(0)
        if not is_plain or rows > self.buckets[-1]:
            return None
        fitting = self.buckets[bisect.bisect_left(self.buckets, rows)]
        return Bucket(fitting, batch.adapters is not None)

    def _batch(self, bucket: Bucket) -> Batch:
        batch = self._padded.batch(bucket.rows, has_adapters=bucket.has_adapters)
        batch.fixed_plans = self._plans.get(bucket.rows)
        return batch

    def _make_plans(self, max_pages: int) -> dict[int, DecodePlans]:
        """FlashInfer's, by rows: the host has a part in each of its steps. Else none."""
        if self._model.attention != "flashinfer":
            return {}
        from model.attention_flashinfer import FlashInfer

        kept = FlashInfer.beside(self._cache)
        # One for all, as only one of them is replayed at a time.
        indices = torch.zeros(max_pages, dtype=torch.int32, device=self._model.device)
        return {rows: kept.decode_plans(rows, indices) for rows in self.buckets}


class PaddedDecodes:
    """Buffers for a batch of decoding rows, and the padded batches that are views of them."""

    def __init__(
        self, max_rows: int, max_blocks: int, block_size: int, device: torch.device
    ) -> None:
        self._block_size = block_size
        # Rows of one buffer: token ids, positions, page and place of the new key.
        self._tokens = torch.zeros(4, max_rows, dtype=torch.int64, device=device)
        self._contexts = torch.ones(max_rows, dtype=torch.int32, device=device)
        self._tables = torch.zeros(max_rows, max_blocks, dtype=torch.int32, device=device)
        self._starts = torch.arange(max_rows + 1, dtype=torch.int32, device=device)
        self._rows = torch.arange(max_rows, device=device)
        self._slots = torch.full((max_rows,), -1, dtype=torch.int32, device=device)

    def batch(self, rows: int, *, has_adapters: bool = False) -> Batch:
        """The first ``rows`` rows. Host lists tell of padding: no graphable kernel reads them."""
        token_ids, positions, slot_blocks, slot_offsets = self._tokens[:, :rows]
        return Batch(
            token_ids=token_ids,
            positions=positions,
            slot_blocks=slot_blocks,
            slot_offsets=slot_offsets,
            query_starts=self._starts[: rows + 1],
            context_lengths=self._contexts[:rows],
            block_tables=self._tables[:rows],
            logit_rows=self._rows[:rows],
            num_decodes=rows,
            query_lengths=[1] * rows,
            contexts=[1] * rows,
            tables=[[0] for _ in range(rows)],
            block_size=self._block_size,
            adapters=AdapterRows([], self._slots[:rows], is_any=True) if has_adapters else None,
        )

    def fill(self, batch: Batch, bucket: int) -> None:
        """The batch's rows, then padding: the first token of a sequence that lies in page 0."""
        rows, width = batch.block_tables.shape
        tokens = (batch.token_ids, batch.positions, batch.slot_blocks, batch.slot_offsets)
        for place, source in zip(self._tokens, tokens, strict=True):
            place[:rows].copy_(source, non_blocking=True)
        self._contexts[:rows].copy_(batch.context_lengths, non_blocking=True)
        self._tables[:rows, :width].copy_(batch.block_tables, non_blocking=True)
        if batch.adapters is not None:
            assert batch.adapters.slots is not None
            assert not batch.adapters.long, "a row of one token is no long run"
            self._slots[:rows].copy_(batch.adapters.slots, non_blocking=True)
            self._slots[rows:bucket].fill_(-1)
        if rows < bucket:
            self._tokens[:, rows:bucket].zero_()
            self._contexts[rows:bucket].fill_(1)
            self._tables[rows:bucket, 0].zero_()


def buckets(max_rows: int) -> list[int]:
    """1, 2, 4, then steps of 8 to 64 and of a quarter of the power of two below beyond."""
    found = [size for size in (1, 2, 4) if size < max_rows]
    size = 8
    while size < max_rows:
        found.append(size)
        size += max(8, 1 << (size.bit_length() - 3))
    return [*found, max_rows]
