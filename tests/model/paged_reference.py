"""Plain paged attention in float32, one sequence at a time, and random batches to try others on."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class PagedCase:
    """Has the fields of ``model.batch.Batch`` that attention reads, and the tensors it is given."""

    q: Tensor  # [T, H, D]
    k_pages: Tensor  # [N, K, P, D]
    v_pages: Tensor
    query_starts: Tensor
    context_lengths: Tensor
    block_tables: Tensor
    num_decodes: int
    query_lengths: list[int]
    contexts: list[int]

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.q.size(-1))

    def to(self, device: str, dtype: torch.dtype) -> PagedCase:
        moved = (each.to(device, dtype) for each in (self.q, self.k_pages, self.v_pages))
        integers = (self.query_starts, self.context_lengths, self.block_tables)
        return PagedCase(
            *moved,
            *(each.to(device) for each in integers),
            self.num_decodes,
            self.query_lengths,
            self.contexts,
        )


def random_case(
    rows: list[tuple[int, int]],
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_size: int = 64,
    page: int = 16,
    shared_pages: int = 0,
    seed: int = 0,
) -> PagedCase:
    """``rows`` are (queries, context), rows of one query first. Pages are dealt in random order.

    Every row's first ``shared_pages`` pages are the same; what no row may read is NaN.
    """
    generator = torch.Generator().manual_seed(seed)
    needed = [math.ceil(context / page) for _, context in rows]
    free = list(range(1, sum(needed) + 2))
    random.Random(seed).shuffle(free)
    width = max(needed) + 1
    shared = [free.pop() for _ in range(shared_pages)]
    tables = [shared[:n] + [free.pop() for _ in range(n - len(shared[:n]))] for n in needed]

    num_pages = sum(needed) + 2
    pages = torch.full((2, num_pages, kv_heads, page, head_size), math.nan)
    for table, (_, context) in zip(tables, rows, strict=True):
        for place, number in enumerate(table):
            filled = min(page, context - place * page)
            entries = torch.randn(2, kv_heads, filled, head_size, generator=generator)
            pages[:, number, :, :filled] = entries
    queries = [count for count, _ in rows]
    return PagedCase(
        q=torch.randn(sum(queries), heads, head_size, generator=generator),
        k_pages=pages[0],
        v_pages=pages[1],
        query_starts=torch.tensor([0, *torch.tensor(queries).cumsum(0)], dtype=torch.int32),
        context_lengths=torch.tensor([context for _, context in rows], dtype=torch.int32),
        block_tables=torch.tensor(
            [table + [0] * (width - len(table)) for table in tables], dtype=torch.int32
        ),
        num_decodes=sum(1 for count in queries if count == 1),
        query_lengths=queries,
        contexts=[context for _, context in rows],
    )


def reference(case: PagedCase, window: int | None = None) -> Tensor:
    """[T, H, D] float32."""
    parts = []
    starts = case.query_starts.tolist()
    for row, (count, context) in enumerate(zip(case.query_lengths, case.contexts, strict=True)):
        keys, values = (
            gathered(pages, case.block_tables[row], context).repeat_interleave(
                case.q.size(1) // pages.size(1), dim=0
            )
            for pages in (case.k_pages, case.v_pages)
        )
        query = case.q[starts[row] : starts[row + 1]].float().transpose(0, 1)  # [H, n, D]
        scores = query @ keys.mT * case.scale
        positions = torch.arange(context - count, context).unsqueeze(1)
        keyed = torch.arange(context).unsqueeze(0)
        hidden = keyed > positions
        if window is not None:
            hidden |= keyed <= positions - window
        scores = scores.masked_fill(hidden.to(scores.device), -math.inf)
        parts.append((scores.softmax(-1) @ values).transpose(0, 1))
    return torch.cat(parts)


def gathered(pages: Tensor, table: Tensor, context: int) -> Tensor:
    """[K, context, D] float32."""
    return pages[table.long()].transpose(0, 1).flatten(1, 2)[:, :context].float()
