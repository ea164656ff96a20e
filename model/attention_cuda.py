"""Paged attention on CUDA: our own Triton kernels, and PyTorch's flash attention over block tables.

Which of them may be used is asked here and nowhere else; nothing of Triton is imported before
``triton_available`` has been asked. Both read pages [num_blocks, num_kv_heads, block_size,
head_size] through int32 tables, and neither synchronises with the host. Each is tried on the device
once a process before it is believed: a kernel that does not compile there, or computes wrongly, is
as good as absent.
"""

# T tokens, S sequences, H query heads, K key heads, D head size, P tokens a page

from __future__ import annotations

import importlib.util
import inspect
import logging
from functools import cache

import torch
from torch import Tensor

from model.attention import Backend, UnavailableBackend, gathered, reference
from model.batch import Batch, BatchBuilder, BatchRow

_FLASH_PAGE = 256  # the bundled FlashAttention 2 wants pages of a multiple of this
_FLASH_HEAD = 256
_FLASH_CAPABILITY = (8, 0)
_TOLERANCE = 0.03  # of bfloat16 results of order 1

log = logging.getLogger(__name__)


def backend(name: str) -> Backend:
    """The backend "triton" or "varlen"; raises ``UnavailableBackend`` where it cannot run."""
    if name == "triton" and triton_available():
        return triton_attention
    if name == "varlen" and varlen_available():
        return varlen_attention
    raise UnavailableBackend(f"the {name} attention backend cannot run on this device; use auto")


@cache
def triton_available() -> bool:
    """Triton is installed, and its kernels run on the device and compute rightly."""
    if not torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return False
    return _is_right(triton_attention, "triton")


@cache
def varlen_available() -> bool:
    """PyTorch has paged ``varlen_attn`` (2.12 on), and it computes rightly on the device.

    Paged FlashAttention 2 has been silently wrong before (pytorch#194167, torchtitan#3235).
    """
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < _FLASH_CAPABILITY:
        return False
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    if "block_table" not in inspect.signature(varlen_attn).parameters:
        return False
    return _is_right(_flash, "varlen")


def varlen_fits(dtype: torch.dtype, head_size: int, block_size: int) -> bool:
    """What the bundled FlashAttention 2 accepts, where ``varlen_available``."""
    return (
        dtype in (torch.float16, torch.bfloat16)
        and head_size <= _FLASH_HEAD
        and head_size % 8 == 0
        and block_size % _FLASH_PAGE == 0
    )


def triton_attention(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, batch: Batch, scale: float, window: int | None
) -> Tensor:
    """[T, H, D] -> [T, H, D], causal; this step's keys are in the pages already.

    ``window`` w lets a query see the w last keys up to its own; None is all of them.
    """
    from model import attention_triton

    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    _decode(q, k_pages, v_pages, batch, scale, window, out)
    first = batch.num_decodes
    if first < len(batch.query_lengths):
        attention_triton.prefill(
            q,
            k_pages,
            v_pages,
            batch.block_tables[first:],
            batch.context_lengths[first:],
            batch.query_starts[first:],
            max(batch.query_lengths[first:]),
            scale,
            window,
            out,
        )
    return out


def varlen_attention(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, batch: Batch, scale: float, window: int | None
) -> Tensor:
    """The same with flash attention for the chunks of prompts, and for decodes without Triton.

    Decoding rows go to our split-KV kernel where it runs: paged flash attention may not split a
    long context, and few rows would leave most of the device idle.
    """
    if not varlen_fits(q.dtype, q.size(2), k_pages.size(2)):
        other = triton_attention if triton_available() else gathered
        return other(q, k_pages, v_pages, batch, scale, window)
    first = batch.num_decodes
    if first == 0 or not triton_available():
        return _flash(q, k_pages, v_pages, batch, scale, window)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    _decode(q, k_pages, v_pages, batch, scale, window, out)
    if first < len(batch.query_lengths):
        chunks = batch.without_decodes()
        out[first:] = _flash(q[first:], k_pages, v_pages, chunks, scale, window)
    return out


def _decode(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    batch: Batch,
    scale: float,
    window: int | None,
    out: Tensor,
) -> None:
    """The leading rows of one token, into the leading rows of ``out``."""
    from model import attention_triton

    if rows := batch.num_decodes:
        tables, contexts = batch.block_tables[:rows], batch.context_lengths[:rows]
        attention_triton.decode(
            q[:rows], k_pages, v_pages, tables, contexts, scale, window, out[:rows]
        )


def _flash(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, batch: Batch, scale: float, window: int | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    out = varlen_attn(
        q,
        k_pages.transpose(1, 2),  # a view: strides pass through
        v_pages.transpose(1, 2),
        batch.query_starts,
        # With pages the keys' starts are not read, but a tensor of that shape is asked for.
        batch.query_starts,
        max(batch.query_lengths),
        batch.block_tables.size(1) * k_pages.size(2),  # of shapes alone: a graph can hold it
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=q.size(1) != k_pages.size(1),
        seqused_k=batch.context_lengths,
        block_table=batch.block_tables,
        num_splits=1,  # with more, paged calls have left rows unwritten
    )
    assert isinstance(out, Tensor)
    return out


def _is_right(attention: Backend, name: str) -> bool:
    """A decode beside a chunk with history, pages in disorder, against plain float32."""
    try:
        error = _largest_error(attention)
    except Exception as failure:  # what compilers and drivers raise is not ours to list
        log.warning("%s attention does not run on this device: %s", name, failure)
        return False
    if not error < _TOLERANCE:  # NaN included
        log.warning("%s attention is wrong on this device by %s: not used", name, error)
        return False
    return True


def _largest_error(attention: Backend) -> float:
    generator = torch.Generator().manual_seed(0)
    pages = torch.randn(2, 6, 2, _FLASH_PAGE, 64, generator=generator)
    k_pages, v_pages = pages.to("cuda", torch.bfloat16)
    q = torch.randn(6, 4, 64, generator=generator).to("cuda", torch.bfloat16)
    rows = [BatchRow([0], 299, [4, 1]), BatchRow([0] * 5, 254, [2, 5])]
    batch = BatchBuilder(8, 2, 2, _FLASH_PAGE, "cuda").build(rows)
    out = attention(q, k_pages, v_pages, batch, 0.125, None)
    expected = reference(q.float(), k_pages, v_pages, batch, 0.125, None)
    return (out.float() - expected).abs().max().item()
