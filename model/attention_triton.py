"""Paged attention as Triton kernels: split-KV decode, and prefill of chunks with their history.

Imported only where Triton is (``model.attention_cuda`` asks). Both kernels fold the query heads
that share a key head into the rows of one matrix product: each page is read once a key head.

Decode follows flash-decoding: a long context is cut in splits that run side by side, each leaving a
normalised output and the log of its weight's sum, merged by a second kernel. A split's length
depends on the width of the block tables alone, never on the batch: no neighbour changes the order
in which a row is summed. Grids depend on shapes alone and nothing synchronises, so that a CUDA
graph can hold a launch and serve any contexts. Rows of context 0 (padding) come out as zeros.

Quantized pages are widened in registers, so memory is read at their size. e4m3 is converted by the
hardware from compute capability 8.9 on, else (and in the interpreter) by moving its bits.
"""

# T tokens, S sequences, H query heads, K key heads, G = H / K, D head size, P tokens a page
# The kernels' sums are kept in base 2: exp2 is what the hardware has.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_LOG2_E = 1.4426950408889634
_MIN_SPLIT, _MAX_SPLITS = 512, 32
_MIN_DOT = 16  # rows and columns of the smallest matrix product the hardware has
# Said aloud, because Triton is about to change the default and warns until it has.
_OPTIONS = {"num_stages": 2, "enable_fp_fusion": True}
_FP8_CAPABILITY = (8, 9)
_FP8_BIAS = tl.constexpr(2.0**120)  # exponents count from 7 in e4m3, from 127 in float32


def decode(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_tables: Tensor,
    contexts: Tensor,
    scale: float,
    window: int | None,
    out: Tensor,
    scales: Tensor | None = None,
) -> None:
    """One query a sequence: q and out [S, H, D], pages [N, K, P, D], tables [S, B], contexts [S].

    ``out`` must be contiguous; elsewhere only a head's entries must lie side by side. ``scales``
    [2, N, K, P] float32 belong to int8 pages.
    """
    assert out.is_contiguous()
    assert q.stride(-1) == k_pages.stride(-1) == v_pages.stride(-1) == 1
    num_rows, num_heads, head_size = q.shape
    num_kv_heads, page_size = k_pages.shape[1:3]
    split = split_length(block_tables.size(1) * page_size)
    num_splits = triton.cdiv(block_tables.size(1) * page_size, split)
    group = num_heads // num_kv_heads
    partial = q.new_empty((num_rows, num_heads, num_splits, head_size), dtype=torch.float32)
    weights = q.new_empty((num_rows, num_heads, num_splits), dtype=torch.float32)
    pages, strides, constants = _page_arguments(k_pages, v_pages, scales, weights)
    _decode_split[(num_rows, num_kv_heads, num_splits)](
        *(q, *pages, partial, weights, block_tables, contexts),
        scale * _LOG2_E,
        *(q.stride(0), q.stride(1), block_tables.stride(0), *strides),
        *(num_heads, num_splits),
        WINDOW=window or 0,
        GROUP=group,
        GROUP_PAD=max(_MIN_DOT, triton.next_power_of_2(group)),
        SPLIT=split,
        **constants,
    )
    _merge_splits[(num_rows, num_heads)](
        *(partial, weights, out, contexts, num_heads, num_splits),
        HEAD=head_size,
        HEAD_PAD=triton.next_power_of_2(head_size),
        WINDOW=window or 0,
        SPLIT=split,
        SPLITS=min(16, triton.next_power_of_2(num_splits)),
        num_warps=4,
        **_OPTIONS,
    )


def prefill(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_tables: Tensor,
    contexts: Tensor,
    query_starts: Tensor,
    max_queries: int,
    scale: float,
    window: int | None,
    out: Tensor,
    scales: Tensor | None = None,
) -> None:
    """Causal, several queries a sequence: its last ones, the rest of the context being history.

    ``query_starts`` [S + 1] are places in ``q`` and ``out`` [T, H, D]; ``max_queries`` bounds a
    sequence's queries. Only the rows between the starts are written.
    """
    assert q.stride(-1) == out.stride(-1) == k_pages.stride(-1) == v_pages.stride(-1) == 1
    num_rows, num_kv_heads = contexts.size(0), k_pages.size(1)
    group = q.size(1) // num_kv_heads
    group_pad = triton.next_power_of_2(group)
    pairs = 64 if q.element_size() <= 2 else 32  # float32 must fit small shared memories too
    queries = max(1, pairs // group_pad)
    pages, strides, constants = _page_arguments(k_pages, v_pages, scales, q)
    _prefill_chunk[(triton.cdiv(max_queries, queries), num_rows, num_kv_heads)](
        *(q, *pages, out, block_tables, contexts, query_starts),
        scale * _LOG2_E,
        *(q.stride(0), q.stride(1), out.stride(0), out.stride(1), block_tables.stride(0)),
        *strides,
        WINDOW=window or 0,
        GROUP=group,
        GROUP_PAD=group_pad,
        QUERIES=queries,
        **constants,
    )


def split_length(max_context: int) -> int:
    """Keys a split: short enough to fill the device, and never more than 32 splits."""
    return max(_MIN_SPLIT, int(triton.next_power_of_2(triton.cdiv(max_context, _MAX_SPLITS))))


def _needs_codes(pages: Tensor) -> bool:
    """Whether e4m3 pages are to be read as bytes: where the device cannot convert them itself."""
    if pages.dtype != torch.float8_e4m3fn:
        return False
    device = pages.device
    return device.type != "cuda" or torch.cuda.get_device_capability(device) < _FP8_CAPABILITY


def _page_arguments(
    k_pages: Tensor, v_pages: Tensor, scales: Tensor | None, unread: Tensor
) -> tuple[tuple[Tensor, ...], tuple[int, ...], dict[str, Any]]:
    """What both kernels find keys and values by: tensors, strides and constants.

    ``unread`` is handed over where there are no scales: an argument must be something.
    """
    has_codes = _needs_codes(k_pages)
    if has_codes:
        k_pages, v_pages = k_pages.view(torch.uint8), v_pages.view(torch.uint8)
    k_scales, v_scales = (unread, unread) if scales is None else scales.unbind()  # [N, K, P]
    assert scales is None or scales.stride(-1) == 1
    scale_strides = (0, 0) if scales is None else k_scales.stride()[:2]
    head_size = k_pages.size(-1)
    head_pad = triton.next_power_of_2(head_size)
    return (
        (k_pages, v_pages, k_scales, v_scales),
        (*k_pages.stride()[:3], *v_pages.stride()[:3], *scale_strides),
        {
            "HEAD": head_size,
            "HEAD_PAD": max(_MIN_DOT, head_pad),
            "PAGE": k_pages.size(2),
            "KEYS": 64 if head_pad <= 128 else 32,
            "FP8_CODES": has_codes,
            "SCALED": scales is not None,
            "num_warps": 4 if head_pad <= 128 else 8,
            **_OPTIONS,
        },
    )


@triton.jit  # type: ignore[untyped-decorator]
def _widened(  # type: ignore[no-untyped-def]
    stored, FP8_CODES: tl.constexpr, dtype: tl.constexpr
):
    if FP8_CODES:
        bits = stored.to(tl.int32)
        moved = ((bits & 0x7F) << 20) | ((bits & 0x80) << 24)
        return (moved.to(tl.float32, bitcast=True) * _FP8_BIAS).to(dtype)
    return stored.to(dtype)


@triton.jit  # type: ignore[untyped-decorator]
def _attend_block(  # type: ignore[no-untyped-def]
    query,  # [rows, D]
    positions,  # [rows]: the last key each row sees
    first,
    end,  # keys from here on are not looked at
    highest,
    total,
    mixed,
    k_pages,
    v_pages,
    k_scales,
    v_scales,
    table,
    kv_head,
    scale,
    k_page_stride,
    k_head_stride,
    k_token_stride,
    v_page_stride,
    v_head_stride,
    v_token_stride,
    scale_page_stride,
    scale_head_stride,
    WINDOW: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    PAGE: tl.constexpr,
    KEYS: tl.constexpr,
    FP8_CODES: tl.constexpr,
    SCALED: tl.constexpr,
):
    """The running softmax (highest score, sum of weights, mixed values) after KEYS more keys."""
    keyed = first + tl.arange(0, KEYS)
    is_key = keyed < end
    if PAGE % KEYS == 0:  # all of them in one page
        page = tl.load(table + first // PAGE).to(tl.int64)
    else:
        page = tl.load(table + keyed // PAGE, mask=is_key, other=0).to(tl.int64)
    inside = keyed % PAGE
    places = tl.arange(0, HEAD_PAD)
    is_entry = is_key[:, None] & (places < HEAD)[None, :]
    k_rows = page * k_page_stride + kv_head * k_head_stride + inside * k_token_stride
    keys = tl.load(k_pages + k_rows[:, None] + places[None, :], mask=is_entry, other=0.0)
    keys = _widened(keys, FP8_CODES, query.dtype)
    scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale
    if SCALED:
        scaled = page * scale_page_stride + kv_head * scale_head_stride + inside
        scores *= tl.load(k_scales + scaled, mask=is_key, other=0.0)[None, :]
    is_seen = is_key[None, :] & (keyed[None, :] <= positions[:, None])
    if WINDOW > 0:
        is_seen &= keyed[None, :] > positions[:, None] - WINDOW
    scores = tl.where(is_seen, scores, float("-inf"))

    peak = tl.maximum(highest, tl.max(scores, 1))
    shift = tl.where(peak == float("-inf"), 0.0, peak)
    shares = tl.exp2(scores - shift[:, None])
    fade = tl.exp2(highest - shift)
    v_rows = page * v_page_stride + kv_head * v_head_stride + inside * v_token_stride
    values = tl.load(v_pages + v_rows[:, None] + places[None, :], mask=is_entry, other=0.0)
    if SCALED:
        v_scale = tl.load(v_scales + scaled, mask=is_key, other=0.0)
        values = (values.to(tl.float32) * v_scale[:, None]).to(query.dtype)
    else:
        values = _widened(values, FP8_CODES, query.dtype)
    mixed = mixed * fade[:, None]
    mixed += tl.dot(shares.to(values.dtype), values, input_precision="ieee")
    return peak, total * fade + tl.sum(shares, 1), mixed


@triton.jit  # type: ignore[untyped-decorator]
def _decode_split(  # type: ignore[no-untyped-def]
    q,  # [S, H, D]
    k_pages,  # [N, K, P, D]
    v_pages,
    k_scales,  # [N, K, P] float32, of int8 pages
    v_scales,
    partial,  # [S, H, splits, D] float32
    weights,  # [S, H, splits] float32: log2 of the sum of weights
    tables,  # [S, B] int32
    contexts,  # [S] int32
    scale,
    q_row_stride,
    q_head_stride,
    table_stride,
    k_page_stride,
    k_head_stride,
    k_token_stride,
    v_page_stride,
    v_head_stride,
    v_token_stride,
    scale_page_stride,
    scale_head_stride,
    num_heads,
    num_splits,
    WINDOW: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    PAGE: tl.constexpr,
    SPLIT: tl.constexpr,
    KEYS: tl.constexpr,
    FP8_CODES: tl.constexpr,
    SCALED: tl.constexpr,
):
    row = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    context = tl.load(contexts + row)
    oldest = tl.maximum(context - WINDOW, 0) if WINDOW > 0 else 0
    if (split * SPLIT >= context) | ((split + 1) * SPLIT <= oldest):
        return  # nothing to see; the merge will not look
    end = tl.minimum((split + 1) * SPLIT, context)
    start = tl.maximum(split * SPLIT, oldest // KEYS * KEYS)

    members = tl.arange(0, GROUP_PAD)
    heads = kv_head * GROUP + members
    places = tl.arange(0, HEAD_PAD)
    is_place = places < HEAD
    is_query = (members < GROUP)[:, None] & is_place[None, :]
    q_offsets = row.to(tl.int64) * q_row_stride + heads[:, None] * q_head_stride + places[None, :]
    query = tl.load(q + q_offsets, mask=is_query, other=0.0)

    highest = tl.full([GROUP_PAD], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_PAD], tl.float32)
    mixed = tl.zeros([GROUP_PAD, HEAD_PAD], tl.float32)
    table = tables + row * table_stride
    positions = tl.full([GROUP_PAD], context - 1, tl.int32)
    for first in range(start, end, KEYS):
        highest, total, mixed = _attend_block(
            *(query, positions, first, end, highest, total, mixed),
            *(k_pages, v_pages, k_scales, v_scales, table, kv_head, scale),
            *(k_page_stride, k_head_stride, k_token_stride),
            *(v_page_stride, v_head_stride, v_token_stride),
            *(scale_page_stride, scale_head_stride),
            *(WINDOW, HEAD, HEAD_PAD, PAGE, KEYS, FP8_CODES, SCALED),
        )

    divisor = tl.where(total > 0, total, 1.0)
    weight = tl.where(total > 0, highest + tl.log2(divisor), float("-inf"))
    slots = (row * num_heads + heads).to(tl.int64) * num_splits + split
    tl.store(weights + slots, weight, mask=members < GROUP)
    offsets = slots[:, None] * HEAD + places[None, :]
    tl.store(partial + offsets, mixed / divisor[:, None], mask=is_query)


@triton.jit  # type: ignore[untyped-decorator]
def _merge_splits(  # type: ignore[no-untyped-def]
    partial,  # [S, H, splits, D] float32
    weights,  # [S, H, splits] float32, base 2
    out,  # [S, H, D], contiguous
    contexts,
    num_heads,
    num_splits,
    HEAD: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLIT: tl.constexpr,
    SPLITS: tl.constexpr,  # looked at together
):
    row = tl.program_id(0)
    slot = (row * num_heads + tl.program_id(1)).to(tl.int64)
    context = tl.load(contexts + row)
    begin = tl.maximum(context - WINDOW, 0) // SPLIT if WINDOW > 0 else 0
    end = tl.cdiv(context, SPLIT)
    places = tl.arange(0, HEAD_PAD)
    is_place = places < HEAD

    highest = float("-inf")
    total = 0.0
    mixed = tl.zeros([HEAD_PAD], tl.float32)
    for first in range(begin, end, SPLITS):
        splits = first + tl.arange(0, SPLITS)
        is_split = splits < end
        weight = tl.load(weights + slot * num_splits + splits, is_split, float("-inf"))
        peak = tl.maximum(highest, tl.max(weight, 0))
        shift = tl.where(peak == float("-inf"), 0.0, peak)
        shares = tl.exp2(weight - shift)
        fade = tl.exp2(highest - shift)
        offsets = (slot * num_splits + splits)[:, None] * HEAD + places[None, :]
        parts = tl.load(partial + offsets, is_split[:, None] & is_place[None, :], 0.0)
        mixed = mixed * fade + tl.sum(parts * shares[:, None], 0)
        total = total * fade + tl.sum(shares, 0)
        highest = peak
    merged = mixed / tl.where(total > 0, total, 1.0)
    tl.store(out + slot * HEAD + places, merged.to(out.dtype.element_ty), mask=is_place)


@triton.jit  # type: ignore[untyped-decorator]
def _prefill_chunk(  # type: ignore[no-untyped-def]
    q,  # [T, H, D]
    k_pages,  # [N, K, P, D]
    v_pages,
    k_scales,  # [N, K, P] float32, of int8 pages
    v_scales,
    out,  # [T, H, D]
    tables,  # [S, B] int32
    contexts,  # [S] int32
    query_starts,  # [S + 1] int32
    scale,
    q_token_stride,
    q_head_stride,
    out_token_stride,
    out_head_stride,
    table_stride,
    k_page_stride,
    k_head_stride,
    k_token_stride,
    v_page_stride,
    v_head_stride,
    v_token_stride,
    scale_page_stride,
    scale_head_stride,
    WINDOW: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    QUERIES: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    PAGE: tl.constexpr,
    KEYS: tl.constexpr,
    FP8_CODES: tl.constexpr,
    SCALED: tl.constexpr,
):
    row = tl.program_id(1)
    kv_head = tl.program_id(2)
    first_token = tl.load(query_starts + row)
    num_queries = tl.load(query_starts + row + 1) - first_token
    first_query = tl.program_id(0) * QUERIES
    if first_query >= num_queries:
        return
    context = tl.load(contexts + row)
    history = context - num_queries

    # One matrix row a pair of query and head of the group.
    pairs = tl.arange(0, QUERIES * GROUP_PAD)
    queries = first_query + pairs // GROUP_PAD
    members = pairs % GROUP_PAD
    heads = kv_head * GROUP + members
    is_pair = (queries < num_queries) & (members < GROUP)
    positions = history + queries
    places = tl.arange(0, HEAD_PAD)
    is_place = places < HEAD
    tokens = (first_token + queries).to(tl.int64)
    q_offsets = (tokens * q_token_stride + heads * q_head_stride)[:, None] + places[None, :]
    query = tl.load(q + q_offsets, mask=is_pair[:, None] & is_place[None, :], other=0.0)

    end = tl.minimum(history + first_query + QUERIES, context)
    oldest = tl.maximum(history + first_query - WINDOW + 1, 0) if WINDOW > 0 else 0
    highest = tl.full([QUERIES * GROUP_PAD], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES * GROUP_PAD], tl.float32)
    mixed = tl.zeros([QUERIES * GROUP_PAD, HEAD_PAD], tl.float32)
    table = tables + row * table_stride
    for first in range(oldest // KEYS * KEYS, end, KEYS):
        highest, total, mixed = _attend_block(
            *(query, positions, first, end, highest, total, mixed),
            *(k_pages, v_pages, k_scales, v_scales, table, kv_head, scale),
            *(k_page_stride, k_head_stride, k_token_stride),
            *(v_page_stride, v_head_stride, v_token_stride),
            *(scale_page_stride, scale_head_stride),
            *(WINDOW, HEAD, HEAD_PAD, PAGE, KEYS, FP8_CODES, SCALED),
        )

    mixed = mixed / tl.where(total > 0, total, 1.0)[:, None]
    out_offsets = (tokens * out_token_stride + heads * out_head_stride)[:, None] + places[None, :]
    is_written = is_pair[:, None] & is_place[None, :]
    tl.store(out + out_offsets, mixed.to(out.dtype.element_ty), mask=is_written)
