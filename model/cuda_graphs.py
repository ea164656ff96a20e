"""Decode steps as CUDA graphs: one launch instead of some thousand.

A graph replays fixed kernels on fixed addresses. So the forward of a decode-only batch is captured
once for each bucket of rows, over buffers of this class's own; a step copies its few integers into
them, pads to the bucket, and replays. Padding rows read and write page 0, which nobody is given.
Whatever is not a plain decode step (prompt chunks, taps, adapters, too many rows) runs eagerly.
"""

# R rows of the batch, B blocks a row, V vocabulary

from __future__ import annotations

import bisect
import logging
import time

import torch
from torch import Tensor

from model.attention_cuda import triton_available
from model.batch import Batch
from model.kv_cache import KVCache
from model.llama import Llama

log = logging.getLogger(__name__)


class DecodeGraphs:
    """``forward`` as ``Llama.forward`` over one cache, by graph where one was captured."""

    def __init__(self, model: Llama, cache: KVCache, max_rows: int, max_blocks: int) -> None:
        self._model, self._cache = model, cache
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.buckets = buckets(max_rows)
        self._padded = PaddedDecodes(max_rows, max_blocks, cache.block_size, model.device)
        # Outside the graphs' memory: what a graph gives out could not be shared with the others.
        self._logits = torch.empty(max_rows, model.config.vocab_size, device=model.device)

    @staticmethod
    def can_capture(model: Llama) -> bool:
        """Whether the launches of this model depend on shapes alone."""
        return model.device.type == "cuda" and (
            model.attention == "triton" or (model.attention == "varlen" and triton_available())
        )

    @torch.inference_mode()
    def capture(self) -> None:
        """All buckets, the largest first, so that the others fit in its memory. Seconds."""
        started = time.monotonic()
        pool = torch.cuda.graph_pool_handle()
        for bucket in reversed(self.buckets):
            self._model.forward(self._padded.batch(bucket), self._cache)  # compiles kernels
            torch.cuda.synchronize()
            batch = self._padded.batch(bucket)  # anew: what a batch prepares belongs in the graph
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                self._logits[:bucket].copy_(self._model.forward(batch, self._cache))
            self._graphs[bucket] = graph
        log.info(
            "captured %d decode graphs in %.1f s", len(self.buckets), time.monotonic() - started
        )

    def forward(self, batch: Batch) -> Tensor:
        """Logits [R, V] float32 of the batch's wanted rows."""
        bucket = self._bucket(batch)
        graph = None if bucket is None else self._graphs.get(bucket)
        if bucket is None or graph is None:
            return self._model.forward(batch, self._cache)
        self._padded.fill(batch, bucket)
        graph.replay()
        # The next step may be replayed before this one's draws are settled from its logits.
        return self._logits[: batch.num_decodes].clone()

    def _bucket(self, batch: Batch) -> int | None:
        """The smallest that holds the batch; None where it is not plain decoding."""
        rows = batch.num_decodes
        is_plain = rows == batch.num_tokens == batch.logit_rows.size(0)
        if batch.adapters is not None or not is_plain or rows > self.buckets[-1]:
            return None
        return self.buckets[bisect.bisect_left(self.buckets, rows)]


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

    def batch(self, rows: int) -> Batch:
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
        )

    def fill(self, batch: Batch, bucket: int) -> None:
        """The batch's rows, then padding: the first token of a sequence that lies in page 0."""
        rows, width = batch.block_tables.shape
        tokens = (batch.token_ids, batch.positions, batch.slot_blocks, batch.slot_offsets)
        for place, source in zip(self._tokens, tokens, strict=True):
            place[:rows].copy_(source, non_blocking=True)
        self._contexts[:rows].copy_(batch.context_lengths, non_blocking=True)
        self._tables[:rows, :width].copy_(batch.block_tables, non_blocking=True)
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
