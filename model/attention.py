"""Attention over the paged cache: one door, several backends.

A step's keys and values are in the pages before ``attention`` is called. ``reference`` is plainly
right; ``cpu`` is the fast one on processors; ``sdpa`` runs anywhere; ``triton``, ``varlen`` and
``flashinfer`` are CUDA's (model/attention_cuda.py).
"""

# T tokens, S rows, H query heads, K key heads, G = H / K, D head size, P tokens a page

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention_cpu import cpu_attention
from model.batch import Batch
from model.kv_cache import KVCache
from model.kv_format import Pages, format_name, layer_pages

log = logging.getLogger(__name__)

BACKENDS = ("auto", "reference", "cpu", "sdpa", "triton", "varlen", "flashinfer")


class UnknownBackend(ValueError):
    """There is no attention backend of that name, or not on this machine."""


def choose_backend(
    name: str,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    head_size: int = 64,
    cache_dtype: torch.dtype | None = None,
) -> str:
    """The backend a name stands for on a device. Raises UnknownBackend with the reason.

    ``varlen`` reads pages of the model's own dtype alone; other caches go to what ``auto`` is. On
    CUDA that is ``triton``, else ``flashinfer`` where it serves such a model, else ``sdpa``.
    """
    if name not in BACKENDS:
        raise UnknownBackend(f"attention backend {name!r}: one of {', '.join(BACKENDS)} is meant")
    pages = cache_dtype or dtype
    if name in ("triton", "varlen", "flashinfer"):
        _check_cuda_backend(name, device, dtype, head_size, pages)
    if name == "cpu" and device.type != "cpu":
        raise UnknownBackend(f"attention backend 'cpu' cannot run on {device}")
    if name == "varlen" and pages != dtype:
        found = choose_backend("auto", device, dtype, head_size, pages)
        log.warning(
            "attention backend 'varlen' reads no %s pages in a %s model: %s is used",
            *(format_name(pages), format_name(dtype), found),
        )
        return found
    if name != "auto":
        return name
    if device.type == "cuda":
        from model.attention_cuda import flashinfer_refusal, triton_available

        if triton_available(pages):
            return "triton"
        return "sdpa" if flashinfer_refusal(dtype, head_size, pages) else "flashinfer"
    return "cpu" if device.type == "cpu" else "sdpa"


def _check_cuda_backend(
    name: str, device: torch.device, dtype: torch.dtype, head_size: int, pages: torch.dtype
) -> None:
    from model.attention_cuda import flashinfer_refusal, triton_available, varlen_available

    if device.type != "cuda":
        raise UnknownBackend(f"attention backend {name!r} needs a CUDA device, this is {device}")
    if name == "flashinfer":
        if refusal := flashinfer_refusal(dtype, head_size, pages):
            raise UnknownBackend(f"attention backend 'flashinfer': {refusal}")
    elif not (triton_available(pages) if name == "triton" else varlen_available()):
        raise UnknownBackend(f"attention backend {name!r} is not available on this machine")


def attention(
    q: Tensor,
    layer: int,
    batch: Batch,
    cache: KVCache,
    *,
    scale: float,
    window: int | None,
    backend: str,
) -> Tensor:
    """[T, H, D] -> [T, H, D]: each token sees its row's keys up to its own, ``window`` of them."""
    keys, values, scales = cache.keys[layer], cache.values[layer], cache.scales_of(layer)
    if backend == "reference":
        return reference(q, keys, values, batch, scale, window, scales)
    if backend == "cpu":
        return cpu_attention(q, keys, values, batch, scale, window, scales)
    if backend in ("triton", "varlen"):
        from model.attention_cuda import paged_attention

        return paged_attention(q, keys, values, batch, scale, window, backend, scales)
    if backend == "flashinfer":
        from model.attention_flashinfer import FlashInfer

        return FlashInfer.beside(cache).attend(q, keys, values, batch, scale, window)
    return gathered(q, keys, values, batch, scale, window, scales)


def reference(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    batch: Batch,
    scale: float,
    window: int | None,
    scales: Tensor | None = None,
) -> Tensor:
    """Row by row, token by token's mask, softmax in float32."""
    out = torch.empty_like(q)
    of_keys, of_values = layer_pages(keys, values, scales, torch.float32)
    start = 0
    for length, context, pages in _rows(batch):
        own = slice(start, start + length)
        k, v = row_keys(of_keys, pages, context), row_keys(of_values, pages, context)
        group = q.size(1) // k.size(0)
        k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)  # H, context, D
        scores = q[own].float().transpose(0, 1) @ k.transpose(1, 2) * scale
        scores = scores.masked_fill(~visible(length, context, window, q.device), float("-inf"))
        out[own] = (scores.softmax(-1) @ v).transpose(0, 1).to(q.dtype)
        start += length
    return out


def gathered(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    batch: Batch,
    scale: float,
    window: int | None,
    scales: Tensor | None = None,
) -> Tensor:
    """Row by row over a copy of its pages; the queries that share a key head are one product."""
    out = torch.empty_like(q)
    of_keys, of_values = layer_pages(keys, values, scales, q.dtype)
    start = 0
    for length, context, pages in _rows(batch):
        own = slice(start, start + length)
        k, v = row_keys(of_keys, pages, context), row_keys(of_values, pages, context)
        heads, group, size = k.size(0), q.size(1) // k.size(0), q.size(2)
        folded = q[own].view(length, heads, group, size).permute(1, 2, 0, 3)
        folded = folded.reshape(1, heads, group * length, size)
        mask = visible(length, context, window, q.device).repeat(group, 1)
        mixed = F.scaled_dot_product_attention(
            folded, k.unsqueeze(0), v.unsqueeze(0), attn_mask=mask, scale=scale
        )
        out[own] = mixed.view(heads, group, length, size).permute(2, 0, 1, 3).flatten(1, 2)
        start += length
    return out


def _rows(batch: Batch) -> Iterator[tuple[int, int, Tensor]]:
    """Each row's number of queries, its context and its pages."""
    for row, (length, context) in enumerate(zip(batch.query_lengths, batch.contexts, strict=True)):
        yield length, context, batch.block_tables[row, : -(-context // batch.block_size)]


def row_keys(pages: Pages, table: Tensor, context: int) -> Tensor:
    """[N, K, P, D] -> [K, context, D]: one row's keys or values, in order."""
    return pages.read(table).transpose(0, 1).flatten(1, 2)[:, :context]


def visible(length: int, context: int, window: int | None, device: torch.device) -> Tensor:
    """[length, context] bool: which keys each of the last ``length`` tokens sees."""
    queries = torch.arange(context - length, context, device=device).unsqueeze(1)
    keys = torch.arange(context, device=device)
    seen = keys <= queries
    return seen if window is None else seen & (keys > queries - window)
