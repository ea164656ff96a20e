"""Attention on processors: decodes page by page in parallel, prompt chunks in tiles.

A tile is so many queries and key heads that its scores stay in the processor's cache. Measured
against the flash kernel of scaled_dot_product_attention in one run (one thread, 8 key heads of 4
queries, 256 tokens seeing 2,048): 51 ms to 77. Many short prompts: 32 of 16 tokens take 16 ms with
their heads at once, 40 one head at a time.
"""

# T tokens, n tokens of a chunk, t of a tile, H query heads, K key heads, h of a tile, G = H / K,
# D head size, P tokens a page

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model.attention_decode import decode
from model.batch import Batch
from model.kv_format import Pages, layer_pages

_TILE = 128  # queries
_SCORES = 1 << 20  # numbers: 2 MB of bfloat16
_KEY_STEP = 64  # a tile's keys are rounded up to it: fewer shapes for oneDNN to compile


def cpu_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    batch: Batch,
    scale: float,
    window: int | None,
    scales: Tensor | None = None,
) -> Tensor:
    """[T, H, D] over pages [all, K, P, D] -> [T, H, D]. ``scales`` [2, all, K, P] of int8 ones."""
    of_keys, of_values = layer_pages(keys, values, scales, q.dtype)
    decodes = batch.num_decodes
    if decodes == len(batch.contexts):
        return decode(q, of_keys, of_values, batch, scale, window)
    out = torch.empty(q.shape, dtype=q.dtype)
    if decodes:
        out[:decodes] = decode(q[:decodes], of_keys, of_values, batch, scale, window)
    start = decodes
    for row in range(decodes, len(batch.contexts)):
        end = start + batch.query_lengths[row]
        chunk = _chunk_plan(batch, row, of_keys, window)
        _attend_chunk(q[start:end], of_keys, of_values, chunk, scale, out[start:end])
        start = end
    return out


@dataclass(slots=True)
class Tile:
    """Queries [start, end) of a chunk see keys [first_key, last_key) of the gathered ones."""

    start: int
    end: int
    first_key: int
    last_key: int
    first_masked: int  # from this key on, and before it, every query sees every key
    mask: Tensor  # [end - start, last_key - first_masked] 0 or -inf


@dataclass(slots=True)
class ChunkPlan:
    pages: Tensor  # the pages with keys that are seen
    tiles: list[Tile]

    def gather(self, pool: Pages) -> Tensor:
        """[all, h, P, D] -> [h, keys, D]; a lone page is read where it lies."""
        if len(self.pages) == 1:
            page = int(self.pages)
            return pool.read(slice(page, page + 1))[0]
        return pool.read(self.pages).transpose(0, 1).flatten(1, 2)


def _attend_chunk(
    q: Tensor, keys: Pages, values: Pages, plan: ChunkPlan, scale: float, out: Tensor
) -> None:
    """[n, H, D] -> [n, H, D], tile by tile; as many key heads at once as the cache holds."""
    heads, width = keys.num_heads, q.size(2)
    folded = (q.view(len(q), heads, -1, width) * scale).permute(1, 2, 0, 3).contiguous()  # K G n D
    mixed = out.view(len(q), heads, -1, width)
    largest = max(tile.mask.size(0) * (tile.last_key - tile.first_key) for tile in plan.tiles)
    at_once = max(1, _SCORES // (folded.size(1) * largest))
    for first in range(0, heads, at_once):
        some = slice(first, first + at_once)
        own_keys, own_values = plan.gather(keys.heads(some)), plan.gather(values.heads(some))
        for tile in plan.tiles:
            seen, asking = slice(tile.first_key, tile.last_key), slice(tile.start, tile.end)
            mixed[asking, some] = _attend_tile(
                folded[some, :, asking], own_keys[:, seen], own_values[:, seen], tile
            ).permute(2, 0, 1, 3)


def _attend_tile(q: Tensor, keys: Tensor, values: Tensor, tile: Tile) -> Tensor:
    """[h, G, t, D] over [h, seen, D] -> [h, G, t, D]."""
    scores = torch.bmm(q.flatten(1, 2), keys.transpose(1, 2)).view(*q.shape[:3], -1)
    scores[..., tile.first_masked - tile.first_key :] += tile.mask
    shares = scores.softmax(-1).flatten(1, 2)
    return torch.bmm(shares, values).view(q.shape)


def _chunk_plan(batch: Batch, row: int, pool: Pages, window: int | None) -> ChunkPlan:
    key = (ChunkPlan, row, window)
    plan: ChunkPlan | None = batch.prepared.get(key)
    if plan is None:
        length, context = batch.query_lengths[row], batch.contexts[row]
        plan = make_chunk_plan(length, context, batch.tables[row], pool, window)
        batch.prepared[key] = plan
    return plan


def make_chunk_plan(
    length: int, context: int, table: list[int], pool: Pages, window: int | None
) -> ChunkPlan:
    size, history = pool.size, context - length
    oldest = 0 if window is None else max(0, history - window + 1)
    skipped = oldest // size  # pages no query sees
    pages = table[skipped:]
    history -= skipped * size  # from here on, positions count from the first page that is seen
    tiles = [
        _tile(start, min(start + _TILE, length), history, len(pages) * size, window, pool.dtype)
        for start in range(0, length, _TILE)
    ]
    return ChunkPlan(torch.tensor(pages), tiles)


def _tile(
    start: int, end: int, history: int, num_keys: int, window: int | None, dtype: torch.dtype
) -> Tile:
    """``num_keys`` have memory behind them, so the last ones may be rounded up into the unseen."""
    oldest = 0 if window is None else max(0, history + start - window + 1)
    first = oldest // _KEY_STEP * _KEY_STEP
    last = min(-(-(history + end) // _KEY_STEP) * _KEY_STEP, num_keys)
    first_masked = history + start if window is None else first
    queries = torch.arange(history + start, history + end).unsqueeze(1)
    keyed = torch.arange(first_masked, last)
    is_hidden = keyed > queries
    if window is not None:
        is_hidden |= keyed <= queries - window
    mask = torch.zeros(is_hidden.shape, dtype=dtype).masked_fill_(is_hidden, float("-inf"))
    return Tile(start, end, first, last, first_masked, mask)
