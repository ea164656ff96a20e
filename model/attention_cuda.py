"""Paged attention on CUDA: our own Triton kernels, PyTorch's flash attention over block tables, and
FlashInfer where it is installed.

Which of them may be used is asked here and nowhere else; nothing of Triton or FlashInfer is
imported before ``triton_available`` or ``flashinfer_refusal`` has been asked. All read pages
[num_blocks, num_kv_heads, block_size, head_size], and none synchronises with the host. Each is
tried on the device once a process before it is believed: a kernel that does not compile there, or
computes wrongly, is as good as absent.
"""

# T tokens, S sequences, H query heads, K key heads, D head size, P tokens a page

from __future__ import annotations

import importlib.util
import inspect
import logging
import math
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:
    from model.batch import Batch

# (q, k_pages, v_pages, batch, scale, window), and for int8 pages their scales -> [T, H, D]
Attend: TypeAlias = "Callable[..., Tensor]"

_FLASH_PAGE = 256  # the bundled FlashAttention 2 wants pages of a multiple of this
_FLASH_HEAD = 256
_FLASH_CAPABILITY = (8, 0)
_FA3_MAJOR = 9  # compute capability 9.0
_TOLERANCE = 0.03  # of bfloat16 results of order 1

log = logging.getLogger(__name__)


def paged_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    batch: Batch,
    scale: float,
    window: int | None,
    backend: str = "triton",
    scales: Tensor | None = None,
) -> Tensor:
    """[T, H, D] -> [T, H, D], causal; this step's keys are in the pages already.

    ``window`` w lets a query see the w last keys up to its own; None is all of them. ``backend`` is
    "triton" or "varlen". ``scales`` [2, N, K, P] float32 belong to int8 pages.
    """
    assert backend in ("triton", "varlen"), backend
    attend = varlen_attention if backend == "varlen" else triton_attention
    return attend(q, k_pages, v_pages, batch, scale, window, scales)


@cache
def triton_available(cache_dtype: torch.dtype = torch.bfloat16) -> bool:
    """Triton is installed, and its kernels run on the device and read such pages rightly."""
    if not torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return False
    return _is_right(triton_attention, "triton", cache_dtype)


@cache
def varlen_available() -> bool:
    """PyTorch has paged ``varlen_attn`` (2.12 on), and it computes rightly on the device.

    By FlashAttention 3 where that is installed and right, else by the bundled 2, which has been
    silently wrong over pages before (pytorch#194167, torchtitan#3235).
    """
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < _FLASH_CAPABILITY:
        return False
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    if "block_table" not in inspect.signature(varlen_attn).parameters:
        return False
    return _activate_fa3() or _is_right(_flash, "varlen")


def _activate_fa3() -> bool:
    """Hopper's own kernels in the place of FlashAttention 2: a package of its own, and a switch of
    the whole process, so only where ``varlen`` was asked for.
    """
    if torch.cuda.get_device_capability()[0] != _FA3_MAJOR:
        return False
    if importlib.util.find_spec("flash_attn_interface") is None:
        return False
    from torch.nn import attention

    try:
        attention.activate_flash_attention_impl("FA3")
    except Exception as failure:  # of a package built for another torch, too
        log.warning("FlashAttention 3 cannot be used: %s", failure)
        return False
    if _is_right(_flash, "FlashAttention 3"):
        return True
    attention.restore_flash_attention_impl()
    return False


def _is_fa3() -> bool:
    from torch.nn.attention import current_flash_attention_impl

    return current_flash_attention_impl() == "FA3"


@cache
def flashinfer_refusal(
    dtype: torch.dtype = torch.bfloat16, head_size: int = 64, pages: torch.dtype | None = None
) -> str | None:
    """Why FlashInfer cannot serve such a model over such pages here, or None.

    Tried with that very shape: without prebuilt kernels it compiles each one where it is first
    used, which takes a while and needs CUDA's compiler.
    """
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if importlib.util.find_spec("flashinfer") is None:
        return "the package is not installed: pip install flashinfer-python"
    from model import attention_flashinfer

    pages = pages or dtype
    if refusal := attention_flashinfer.refusal(dtype, head_size, pages):
        return refusal
    if not _is_right(flashinfer_attention, "flashinfer", pages, dtype, head_size):
        return "it does not run, or not rightly, on this device: see the log"
    return None


def varlen_fits(dtype: torch.dtype, head_size: int, block_size: int) -> bool:
    """What flash attention accepts, where ``varlen_available``; 3 takes pages of any size."""
    return (
        dtype in (torch.float16, torch.bfloat16)
        and head_size <= _FLASH_HEAD
        and head_size % 8 == 0
        and (block_size % _FLASH_PAGE == 0 or _is_fa3())
    )


def flashinfer_attention(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, batch: Batch, scale: float, window: int | None
) -> Tensor:
    """FlashInfer with a workspace for this one call; serving keeps one beside the cache."""
    from model.attention_flashinfer import FlashInfer

    return FlashInfer(q.device).attend(q, k_pages, v_pages, batch, scale, window)


def triton_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    batch: Batch,
    scale: float,
    window: int | None,
    scales: Tensor | None = None,
) -> Tensor:
    """Split-KV decode for the leading rows of one token, chunk prefill for the others."""
    from model import attention_triton

    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    _decode(q, k_pages, v_pages, batch, scale, window, out, scales)
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
            scales,
        )
    return out


def varlen_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    batch: Batch,
    scale: float,
    window: int | None,
    scales: Tensor | None = None,
) -> Tensor:
    """Flash attention for the chunks of prompts, and for decodes where Triton is not.

    Decoding rows go to our split-KV kernel where it runs: paged flash attention may not split a
    long context, and few rows would leave most of the device idle.
    """
    if k_pages.dtype != q.dtype or not varlen_fits(q.dtype, q.size(2), k_pages.size(2)):
        from model.attention import gathered

        elsewhere = triton_attention if triton_available() else gathered
        return elsewhere(q, k_pages, v_pages, batch, scale, window, scales)
    if batch.num_decodes == 0 or not triton_available():
        return _flash(q, k_pages, v_pages, batch, scale, window)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    _decode(q, k_pages, v_pages, batch, scale, window, out)
    first = batch.num_decodes
    if first < len(batch.query_lengths):
        out[first:] = _flash(q, k_pages, v_pages, batch, scale, window, first)
    return out


def _decode(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    batch: Batch,
    scale: float,
    window: int | None,
    out: Tensor,
    scales: Tensor | None = None,
) -> None:
    """The leading rows of one token, into the leading rows of ``out``."""
    from model import attention_triton

    if rows := batch.num_decodes:
        tables, contexts = batch.block_tables[:rows], batch.context_lengths[:rows]
        attention_triton.decode(
            q[:rows], k_pages, v_pages, tables, contexts, scale, window, out[:rows], scales
        )


def _flash(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    batch: Batch,
    scale: float,
    window: int | None,
    first: int = 0,
) -> Tensor:
    """The rows from ``first`` on; those before it are of one token each."""
    from torch.nn.attention.varlen import varlen_attn

    query_starts = batch.query_starts[first:] - first if first else batch.query_starts
    block_tables = batch.block_tables[first:]
    out = varlen_attn(
        q[first:],
        k_pages.transpose(1, 2),  # a view: strides pass through
        v_pages.transpose(1, 2),
        query_starts,
        # With pages the keys' starts are not read: 2 asks for a tensor of that shape, 3 for none.
        None if _is_fa3() else query_starts,
        max(batch.query_lengths[first:]),
        block_tables.size(1) * k_pages.size(2),  # of shapes alone: a graph can hold it
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=q.size(1) != k_pages.size(1),
        seqused_k=batch.context_lengths[first:],
        block_table=block_tables,
        num_splits=1,  # with more, paged calls have left rows unwritten
    )
    assert isinstance(out, Tensor)
    return out


def _is_right(
    attend: Attend,
    name: str,
    cache_dtype: torch.dtype = torch.bfloat16,
    dtype: torch.dtype = torch.bfloat16,
    head_size: int = 64,
) -> bool:
    """A decode beside a chunk with history, pages in disorder, against plain float32."""
    try:
        error = _largest_error(attend, cache_dtype, dtype, head_size)
    except Exception as failure:  # what compilers and drivers raise is not ours to list
        log.warning("%s attention does not run on this device: %s", name, failure)
        return False
    if not error < _TOLERANCE:  # NaN included
        log.warning("%s attention is wrong on this device by %s: not used", name, error)
        return False
    return True


def _largest_error(
    attend: Attend,
    cache_dtype: torch.dtype,
    dtype: torch.dtype,
    head_size: int,
    device: str = "cuda",
) -> float:
    from model.batch import BatchBuilder, BatchRow
    from model.kv_format import dequantize, quantize

    generator = torch.Generator().manual_seed(0)
    pages = torch.randn(2, 6, 2, _FLASH_PAGE, head_size, generator=generator).to(device, dtype)
    q = torch.randn(6, 4, head_size, generator=generator).to(device, dtype)
    rows = [BatchRow([0], 299, [4, 1], 1), BatchRow([0] * 5, 254, [2, 5], 1)]
    batch = BatchBuilder(8, 2, 2, _FLASH_PAGE, device).build(rows)
    stored, scales = quantize(pages, cache_dtype)
    beside = () if scales is None else (scales,)
    out = attend(q, *stored.unbind(), batch, head_size**-0.5, None, *beside)
    pages = dequantize(stored, scales, torch.float32)
    expected = [
        _plain(own, pages[:, row.block_table].transpose(1, 2).flatten(2, 3), row.start)
        for own, row in zip((q[:1], q[1:]), rows, strict=True)
    ]
    return (out.float() - torch.cat(expected)).abs().max().item()


def _plain(q: Tensor, keys_values: Tensor, history: int) -> Tensor:
    """q [n, H, D] behind ``history`` keys of [2, K, more, D]: causal attention in float32."""
    num_queries, num_heads, head_size = q.shape
    keys, values = keys_values[:, :, : history + num_queries].float()
    keys, values = (each.repeat_interleave(num_heads // each.size(0), 0) for each in (keys, values))
    scores = q.float().transpose(0, 1) @ keys.mT / math.sqrt(head_size)
    hidden = torch.ones_like(scores, dtype=torch.bool).triu(history + 1)
    shares = scores.masked_fill(hidden, -math.inf).softmax(-1)
    return torch.transpose(shares @ values, 0, 1)
