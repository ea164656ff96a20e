"""Causal attention over the paged cache, in several backends with one signature.

Each takes q [T, H, D] (turned already), one layer's pages [num_blocks, KV, block_size, D] in which
this step's keys and values stand already, the batch, the scale, the window; it gives [T, H, D].
"""

# T tokens, S rows, H query heads, KV kv heads, G query heads a kv head, D head size, C context

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from model.batch import Batch

Backend: TypeAlias = Callable[[Tensor, Tensor, Tensor, Batch, float, "int | None"], Tensor]

BACKENDS = ("reference", "cpu", "sdpa", "triton", "varlen")


class UnavailableBackend(ValueError):
    """An attention backend that does not exist or cannot run here; the text says which could."""


def choose_backend(name: str, device: torch.device) -> tuple[str, Backend]:
    """The backend ``name`` on ``device``; ``auto`` is the fastest present."""
    if name == "auto":
        name = "cpu" if device.type == "cpu" else _best_on_cuda()
    if name not in BACKENDS:
        raise UnavailableBackend(f"no attention backend {name!r}: there are {', '.join(BACKENDS)}")
    if name in ("reference", "sdpa"):
        return name, {"reference": reference, "sdpa": gathered}[name]
    if name == "cpu":
        if device.type != "cpu":
            raise UnavailableBackend("the cpu attention backend runs on a CPU only; use auto")
        return name, on_cpu
    if device.type != "cuda":
        raise UnavailableBackend(f"the {name} attention backend needs a CUDA device; use auto")
    from model import attention_cuda

    return name, attention_cuda.backend(name)


def _best_on_cuda() -> str:
    from model import attention_cuda

    if attention_cuda.varlen_available():
        return "varlen"
    return "triton" if attention_cuda.triton_available() else "sdpa"


def reference(
    q: Tensor, keys: Tensor, values: Tensor, batch: Batch, scale: float, window: int | None
) -> Tensor:
    """One sequence after another, softmax in float32: plainly right, for tests."""
    outputs = []
    for row, own in enumerate(_split(q, batch)):
        k, v = _history(keys, values, batch, row)  # [KV, C, D]
        group = own.shape[1] // k.shape[0]
        k, v = (x.float().repeat_interleave(group, dim=0) for x in (k, v))
        scores = own.float().transpose(0, 1) @ k.transpose(1, 2) * scale
        scores = scores.masked_fill(~_visible(batch, row, window, q.device), float("-inf"))
        outputs.append((scores.softmax(-1) @ v).transpose(0, 1).to(q.dtype))
    return torch.cat(outputs)


def gathered(
    q: Tensor, keys: Tensor, values: Tensor, batch: Batch, scale: float, window: int | None
) -> Tensor:
    """PyTorch's fused attention over each row's gathered pages: any device, any shape."""
    outputs = []
    for row, own in enumerate(_split(q, batch)):
        k, v = _history(keys, values, batch, row)
        outputs.append(_attend_chunk(own, k, v, _mask(batch, row, window, q.device), scale))
    return torch.cat(outputs)


def on_cpu(
    q: Tensor, keys: Tensor, values: Tensor, batch: Batch, scale: float, window: int | None
) -> Tensor:
    """Decoding rows together over their pages, prompt chunks one after another."""
    count = batch.num_decodes
    outputs = []
    if count:
        outputs.append(_decode_rows(q[:count], keys, values, batch, scale, window))
    for row, own in enumerate(_split(q, batch)[count:], start=count):
        k, v = _history(keys, values, batch, row)
        outputs.append(_attend_chunk(own, k, v, _mask(batch, row, window, q.device), scale))
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def _split(q: Tensor, batch: Batch) -> tuple[Tensor, ...]:
    return torch.split(q, batch.query_lengths)


def _history(keys: Tensor, values: Tensor, batch: Batch, row: int) -> tuple[Tensor, Tensor]:
    """[KV, C, D] of one row: a view where its pages lie one after another, else gathered."""
    context, size = batch.contexts[row], batch.block_size
    blocks = batch.block_lists[row][: -(-context // size)]
    if len(blocks) == 1:
        return keys[blocks[0], :, :context], values[blocks[0], :, :context]
    index = torch.tensor(blocks, device=keys.device)
    k, v = (pages[index].transpose(0, 1).flatten(1, 2)[:, :context] for pages in (keys, values))
    return k, v


def _visible(batch: Batch, row: int, window: int | None, device: torch.device) -> Tensor:
    """[queries, C] True where a query may look: not ahead, not past the window."""
    context, count = batch.contexts[row], batch.query_lengths[row]
    query = torch.arange(context - count, context, device=device).unsqueeze(1)
    key = torch.arange(context, device=device)
    seen = key <= query
    return seen & (key > query - window) if window else seen


def _mask(batch: Batch, row: int, window: int | None, device: torch.device) -> Tensor | None:
    if batch.query_lengths[row] == 1 and not window:
        return None
    return _visible(batch, row, window, device)


def _attend_chunk(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """q [n, H, D] against k, v [KV, C, D]."""
    group = q.shape[1] // k.shape[0]
    own = q.transpose(0, 1).unsqueeze(0)
    k, v = (x.repeat_interleave(group, dim=0).unsqueeze(0) for x in (k, v))
    out = F.scaled_dot_product_attention(own, k, v, attn_mask=mask, scale=scale)
    return out.squeeze(0).transpose(0, 1)


def _decode_rows(
    q: Tensor, keys: Tensor, values: Tensor, batch: Batch, scale: float, window: int | None
) -> Tensor:
    """One token a row: the pages of all rows are the batch of one product, merged by row.

    Each (row, page) pair gives a partial softmax; pairs of a row are merged by their maxima
    (Milakov and Gimelshein 2018). The query group is folded into rows of the product.
    """
    size, (num_rows, heads, head_size) = batch.block_size, q.shape
    kv_heads = keys.shape[1]
    owners: list[int] = []
    pages: list[int] = []
    spans: list[tuple[int, int]] = []  # first and end of the visible keys in each page
    for row in range(num_rows):
        context = batch.contexts[row]
        start = max(0, context - window) if window else 0
        for number in range(start // size, -(-context // size)):
            owners.append(row)
            pages.append(batch.block_lists[row][number])
            base = number * size
            spans.append((max(0, start - base), min(size, context - base)))
    longest = max(end for _, end in spans)
    owner, page = torch.tensor(owners), torch.tensor(pages)
    k, v = keys[page, :, :longest], values[page, :, :longest]  # P, KV, L, D
    own = q.view(num_rows, kv_heads, -1, head_size)[owner]  # P, KV, G, D
    scores = (own @ k.transpose(2, 3)).float() * scale
    place, bounds = torch.arange(longest), torch.tensor(spans)
    seen = (place >= bounds[:, :1]) & (place < bounds[:, 1:])
    scores = scores.masked_fill(~seen[:, None, None], float("-inf"))
    top = scores.amax(-1, keepdim=True)  # P, KV, G, 1
    highest = top.new_full((num_rows, *top.shape[1:]), float("-inf"))
    highest.scatter_reduce_(0, owner.view(-1, 1, 1, 1).expand_as(top), top, "amax")
    weights = (scores - highest[owner]).exp()
    total = torch.zeros_like(highest).index_add_(0, owner, weights.sum(-1, keepdim=True))
    partial = (weights.to(v.dtype) @ v).float()
    merged = q.new_zeros(num_rows, *partial.shape[1:], dtype=torch.float32)
    merged.index_add_(0, owner, partial)
    return (merged / total).to(q.dtype).view(num_rows, heads, head_size)
