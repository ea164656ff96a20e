"""Decoding rows on processors: the pages they hold are the batch of one matrix product.

Whatever rows the pages belong to and in whatever order: those that lie side by side in the pool are
read in place, scattered ones gathered. Quantized ones are widened block by block; their scales
multiply scores and shares, which are fewer than keys and values. The queries of a page's holders
(several rows may share one) are rows of its product. What the pages give is merged per row by the
log of its sums.
"""

# S rows, H query heads, K key heads, G = H / K, D head size, P tokens a page,
# N pages of a group, n holders of each, E pages times holders

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from model.batch import Batch
from model.kv_format import Pages

# A product of its own costs about as much as gathering so many bytes of keys and values,
_RUN_BYTES = 4 << 20
# and what is gathered at once should still be in the processor's cache when it is multiplied:
# 128 scattered pages of 8 key heads take 10 ms a layer so, 45 ms in one piece, 9 ms side by side.
_BLOCK_BYTES = 8 << 20


@dataclass(slots=True)
class PageGroup:
    """Pages with equally many holders, all computed by one product.

    ``pages`` are a range of the pool, read in place, or numbers to gather.
    """

    pages: slice | Tensor
    holders: Tensor  # [N * n] rows
    num_holders: int
    mask: Tensor | None  # [N, 1, n, 1, P], 0 or -inf; None where every key is seen


@dataclass(slots=True)
class DecodePlan:
    """Which pages a step's decoding rows read; the same for every layer of one window."""

    groups: list[PageGroup]
    owners: Tensor  # [E] the row of each page-and-holder, in the groups' order
    is_single: bool  # every row has one page
    order: Tensor | None  # [S] where each row's only entry lies; None where in order
    entries: Tensor  # [S * most] where each row's entries lie, short rows' first one repeated


def decode(
    q: Tensor, keys: Pages, values: Pages, batch: Batch, scale: float, window: int | None
) -> Tensor:
    """One token a row: [S, H, D] -> [S, H, D]."""
    plan = _decode_plan(batch, keys, window)
    grouped = q.reshape(len(q), keys.num_heads, -1, q.size(2))  # S, K, G, D
    if plan.is_single:
        return _decode_single(grouped, keys, values, plan, scale).reshape(q.shape)
    if len(q) == 1 and len(plan.groups) == 1:
        return _decode_lone(grouped, keys, values, plan.groups[0], scale).view(q.shape)
    return _decode_merged(grouped, keys, values, plan, scale).view(q.shape)


def _decode_single(q: Tensor, keys: Pages, values: Pages, plan: DecodePlan, scale: float) -> Tensor:
    parts = []
    for group in plan.groups:
        shares = _scores(q, keys, group, scale).softmax(-1)
        parts.append(_mix(shares, values, group))
    mixed = parts[0] if len(parts) == 1 else torch.cat(parts)
    return mixed if plan.order is None else mixed.index_select(0, plan.order)


def _decode_lone(q: Tensor, keys: Pages, values: Pages, group: PageGroup, scale: float) -> Tensor:
    """All pages are one row's: nothing needs to be weighed, in half the operations."""
    scores = _scores(q, keys, group, scale)
    shares = (scores - scores.amax((0, 4), keepdim=True)).exp_()
    total = shares.sum((0, 4), dtype=torch.float32).view(q.size(1), -1, 1)
    return _mix(shares, values, group).sum(0, dtype=torch.float32).div_(total).to(q.dtype)


def _decode_merged(q: Tensor, keys: Pages, values: Pages, plan: DecodePlan, scale: float) -> Tensor:
    """Every page's shares are relative to its own peak; peaks and sums weigh the pages."""
    parts, peaks, sums = [], [], []
    for group in plan.groups:
        scores = _scores(q, keys, group, scale)
        peak = scores.amax(-1, keepdim=True)
        shares = (scores - peak).exp_()
        parts.append(_mix(shares, values, group))
        peaks.append(_by_holder(peak, group))
        sums.append(_by_holder(shares.sum(-1, keepdim=True, dtype=torch.float32), group))
    mixed, peak, total = (_joined(each).float() for each in (parts, peaks, sums))
    owners = plan.owners
    highest = peak.index_select(0, plan.entries).view(len(q), -1, *peak.shape[1:]).amax(1)
    weight = (peak - highest.index_select(0, owners)).exp_()
    total = torch.zeros_like(highest).index_add_(0, owners, total.mul_(weight))
    mixed = torch.zeros(q.shape).index_add_(0, owners, mixed.mul_(weight))
    return mixed.div_(total).to(q.dtype)


def _scores(q: Tensor, keys: Pages, group: PageGroup, scale: float) -> Tensor:
    """[N, K, n, G, P]: every holder's queries times its page's keys, masked."""
    pages, own_scales = keys.unscaled(group.pages)
    held = q.index_select(0, group.holders)
    num_pages, heads, size, width = pages.shape
    if group.num_holders > 1:
        held = held.view(num_pages, group.num_holders, heads, -1, width).transpose(1, 2)
    scores = torch.bmm(
        held.reshape(num_pages * heads, -1, width), pages.flatten(0, 1).transpose(1, 2)
    ).view(num_pages, heads, group.num_holders, -1, size)
    if own_scales is not None:
        scores *= own_scales[:, :, None, None]
    return scores.mul_(scale) if group.mask is None else group.mask.add(scores, alpha=scale)


def _mix(shares: Tensor, values: Pages, group: PageGroup) -> Tensor:
    """[N, K, n, G, P] of the page's values -> [N * n, K, G, D]."""
    pages, own_scales = values.unscaled(group.pages)
    if own_scales is not None:
        shares = (shares * own_scales[:, :, None, None]).to(shares.dtype)
    pages = pages.flatten(0, 1)
    mixed = torch.bmm(shares.view(len(pages), -1, shares.size(-1)), pages)
    return _by_holder(mixed.view(*shares.shape[:-1], -1), group)


def _by_holder(x: Tensor, group: PageGroup) -> Tensor:
    """[N, K, n, G, ...] -> [N * n, K, G, ...]."""
    return x.squeeze(2) if group.num_holders == 1 else x.transpose(1, 2).flatten(0, 1)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _decode_plan(batch: Batch, pool: Pages, window: int | None) -> DecodePlan:
    key = (DecodePlan, window)
    plan: DecodePlan | None = batch.prepared.get(key)
    if plan is None:
        plan = batch.prepared[key] = make_decode_plan(batch, pool, window)
    return plan


def make_decode_plan(batch: Batch, pool: Pages, window: int | None) -> DecodePlan:
    holders: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
    size = batch.block_size
    for row in range(batch.num_decodes):
        context = batch.contexts[row]
        oldest = 0 if window is None else max(0, context - window)
        table = batch.tables[row]
        for place in range(oldest // size, len(table)):
            begin = place * size
            seen = (row, max(oldest - begin, 0), min(context - begin, size))
            holders[table[place]].append(seen)
    by_count: dict[int, list[int]] = defaultdict(list)
    for page, rows in holders.items():
        by_count[len(rows)].append(page)
    groups = [
        _page_group(pages, holders, pool)
        for same in by_count.values()
        for pages in _stretches(sorted(same), pool)
    ]
    owners = _joined([group.holders for group in groups])
    entries = _entries_by_row(owners.tolist(), batch.num_decodes)
    is_single = len(owners) == batch.num_decodes
    in_order = is_single and entries == list(range(len(entries)))
    places = torch.tensor(entries)
    return DecodePlan(groups, owners, is_single, None if in_order else places, places)


def _entries_by_row(owners: list[int], num_rows: int) -> list[int]:
    found: list[list[int]] = [[] for _ in range(num_rows)]
    for entry, row in enumerate(owners):
        found[row].append(entry)
    most = max(map(len, found))
    return [entry for own in found for entry in own + own[:1] * (most - len(own))]


def _stretches(pages: list[int], pool: Pages) -> Iterator[list[int]]:
    """Pages side by side, to be read in place; the others in blocks, to be gathered or widened."""
    breaks = [i for i in range(1, len(pages)) if pages[i] != pages[i - 1] + 1]
    runs = [pages[start:end] for start, end in itertools.pairwise([0, *breaks, len(pages)])]
    page_bytes = 2 * pool.bytes_as_read
    scattered = []
    for run in runs:
        if pool.is_as_read and (len(runs) == 1 or len(run) * page_bytes >= _RUN_BYTES):
            yield run
        else:
            scattered += run
    count = max(1, _BLOCK_BYTES // page_bytes)
    for start in range(0, len(scattered), count):
        yield scattered[start : start + count]


def _page_group(
    pages: list[int], holders: dict[int, list[tuple[int, int, int]]], pool: Pages
) -> PageGroup:
    seen = torch.tensor([holders[page] for page in pages])  # N, n, 3
    first, size = pages[0], pool.size
    is_run = pages[-1] - first + 1 == len(pages)
    return PageGroup(
        pages=slice(first, first + len(pages)) if is_run else torch.tensor(pages),
        holders=seen[..., 0].flatten(),
        num_holders=seen.size(1),
        mask=_page_mask(seen[..., 1:2], seen[..., 2:3], size, pool.dtype),
    )


def _page_mask(begin: Tensor, end: Tensor, size: int, dtype: torch.dtype) -> Tensor | None:
    """[N, n, 1] first and past-last key seen -> [N, 1, n, 1, P]."""
    places = torch.arange(size)
    is_hidden = (places < begin) | (places >= end)
    if not bool(is_hidden.any()):
        return None
    mask = torch.zeros(is_hidden.shape, dtype=dtype).masked_fill_(is_hidden, float("-inf"))
    return mask.unsqueeze(2).unsqueeze(1)
