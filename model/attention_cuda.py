"""Paged attention on CUDA: our own Triton kernels, or PyTorch's flash attention over block tables.

Which of them may be used is asked here and nowhere else; nothing of Triton is imported before
``triton_available`` has said yes. Both take pages [num_blocks, num_kv_heads, block_size, head_size]
and int32 tables, and neither synchronises with the host.
"""

# T tokens, S sequences, H query heads, K key heads, D head size, P tokens a page

from __future__ import annotations

import importlib.util
import inspect
import math
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from model.batch import Batch

_FLASH_PAGE = 256  # the bundled FlashAttention 2 wants pages of a multiple of this
_FLASH_HEAD = 256
_FLASH_CAPABILITY = (8, 0)


def triton_available() -> bool:
    """Triton is installed and a device is there to run it."""
    return torch.cuda.is_available() and importlib.util.find_spec("triton") is not None


@cache
def varlen_available() -> bool:
    """PyTorch has paged ``varlen_attn`` (2.12 on), the device runs it, and it computes rightly.

    The last is tried, once a process: paged FlashAttention 2 has been silently wrong before
    (pytorch#194167, torchtitan#3235).
    """
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < _FLASH_CAPABILITY:
        return False
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return "block_table" in inspect.signature(varlen_attn).parameters and _varlen_is_right()


def varlen_fits(dtype: torch.dtype, head_size: int, block_size: int) -> bool:
    """What the bundled FlashAttention 2 accepts, where ``varlen_available``."""
    return (
        dtype in (torch.float16, torch.bfloat16)
        and head_size <= _FLASH_HEAD
        and head_size % 8 == 0
        and block_size % _FLASH_PAGE == 0
    )


def paged_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    batch: Batch,
    scale: float,
    window: int | None,
    backend: str = "triton",
) -> Tensor:
    """[T, H, D] -> [T, H, D], causal; this step's keys are already in the pages.

    ``window`` w lets a query see the w last keys up to its own; None is all of them. ``backend`` is
    "triton" or "varlen".
    """
    if backend == "varlen":
        return _varlen(q, k_pages, v_pages, batch, scale, window)
    assert backend == "triton", backend
    return _triton(q, k_pages, v_pages, batch, scale, window)


def _triton(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, batch: Batch, scale: float, window: int | None
) -> Tensor:
    from model import attention_triton

    decodes = batch.num_decodes
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    tables, contexts = batch.block_tables, batch.context_lengths
    if decodes:
        attention_triton.decode(
            q[:decodes],
            k_pages,
            v_pages,
            tables[:decodes],
            contexts[:decodes],
            scale,
            window,
            out[:decodes],
        )
    if decodes < tables.size(0):
        attention_triton.prefill(
            q,
            k_pages,
            v_pages,
            tables[decodes:],
            contexts[decodes:],
            batch.query_starts[decodes:],
            max(batch.query_lengths[decodes:], default=1),
            scale,
            window,
            out,
        )
    return out


def _varlen(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, batch: Batch, scale: float, window: int | None
) -> Tensor:
    return _flash(
        q,
        k_pages,
        v_pages,
        batch.query_starts,
        batch.context_lengths,
        batch.block_tables,
        max(batch.query_lengths, default=1),
        scale,
        window,
    )


def _flash(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    query_starts: Tensor,
    contexts: Tensor,
    block_tables: Tensor,
    max_queries: int,
    scale: float,
    window: int | None,
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    out = varlen_attn(
        q,
        k_pages.transpose(1, 2),  # a view: strides pass through
        v_pages.transpose(1, 2),
        query_starts,
        # With pages the keys' starts are not read, but a tensor of that shape is asked for.
        query_starts,
        max_queries,
        block_tables.size(1) * k_pages.size(2),  # of shapes alone, so that a graph can hold it
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=q.size(1) != k_pages.size(1),
        seqused_k=contexts,
        block_table=block_tables,
        num_splits=1,  # with more, paged calls have left rows unwritten
    )
    assert isinstance(out, Tensor)
    return out


def _varlen_is_right() -> bool:
    """A decode beside a chunk with history, pages in disorder, against plain float32."""
    generator = torch.Generator().manual_seed(0)
    pages = torch.randn(2, 6, 2, _FLASH_PAGE, 64, generator=generator).to("cuda", torch.bfloat16)
    q = torch.randn(6, 4, 64, generator=generator).to("cuda", torch.bfloat16)
    starts = torch.tensor([0, 1, 6], dtype=torch.int32, device="cuda")
    contexts = torch.tensor([300, 259], dtype=torch.int32, device="cuda")
    tables = torch.tensor([[4, 1], [2, 5]], dtype=torch.int32, device="cuda")
    try:
        out = _flash(q, pages[0], pages[1], starts, contexts, tables, 5, 0.125, None)
    except RuntimeError:  # no kernel for this device
        return False
    expected = torch.cat(
        [
            _plain(q[:1], *(_gathered(kind, tables[0], 300) for kind in pages)),
            _plain(q[1:], *(_gathered(kind, tables[1], 259) for kind in pages)),
        ]
    )
    return bool((out.float() - expected).abs().max() < 0.03)


def _gathered(pages: Tensor, table: Tensor, context: int) -> Tensor:
    """[K, context, D] float32: a sequence's keys or values out of its pages."""
    return pages[table.long()].transpose(0, 1).flatten(1, 2)[:, :context].float()


def _plain(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """[n, H, D] queries, the last n of the keys' positions, causal, in float32."""
    num_queries, num_heads, head_size = q.shape
    keys, values = (each.repeat_interleave(num_heads // len(each), 0) for each in (keys, values))
    scores = q.float().transpose(0, 1) @ keys.mT / math.sqrt(head_size)
    history = keys.size(1) - num_queries
    hidden = torch.ones_like(scores, dtype=torch.bool).triu(history + 1)
    return (scores.masked_fill(hidden, -math.inf).softmax(-1) @ values).transpose(0, 1)
