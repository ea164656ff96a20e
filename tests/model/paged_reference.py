"""Plain paged attention in float32, one sequence at a time, and random batches to try others on."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from model.batch import Batch, BatchBuilder, BatchRow


@dataclass
class PagedCase:
    q: Tensor  # [T, H, D]
    k_pages: Tensor  # [N, K, P, D]
    v_pages: Tensor
    batch: Batch

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.q.size(-1))

    def to(self, device: str, dtype: torch.dtype) -> PagedCase:
        names = ("query_starts", "context_lengths", "block_tables")
        moved = {name: getattr(self.batch, name).to(device) for name in names}
        tensors = (each.to(device, dtype) for each in (self.q, self.k_pages, self.v_pages))
        return PagedCase(*tensors, replace(self.batch, **moved))


def random_case(
    rows: list[tuple[int, int]],
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_size: int = 64,
    page: int = 16,
    shared_pages: int = 0,
    seed: int = 0,
    unread: float = math.nan,
) -> PagedCase:
    """``rows`` are (queries, context), rows of one query first. Pages are dealt in random order.

    Every row's first ``shared_pages`` pages are the same; entries no row may read are ``unread``.
    """
    needed = [math.ceil(context / page) for _, context in rows]
    free = list(range(1, sum(needed) + 2))
    random.Random(seed).shuffle(free)
    shared = [free.pop() for _ in range(shared_pages)]
    tables = [shared[:n] + [free.pop() for _ in range(n - len(shared[:n]))] for n in needed]

    generator = torch.Generator().manual_seed(seed)
    pages = torch.full((2, sum(needed) + 2, kv_heads, page, head_size), unread)
    for table, (_, context) in zip(tables, rows, strict=True):
        for place, number in enumerate(table):
            filled = min(page, context - place * page)
            pages[:, number, :, :filled] = torch.randn(
                2, kv_heads, filled, head_size, generator=generator
            )
    num_tokens = sum(count for count, _ in rows)
    builder = BatchBuilder(num_tokens, len(rows), max(needed), page, "cpu")
    batch = builder.build(
        [
            BatchRow([0] * count, context - count, table, num_logits=1)
            for (count, context), table in zip(rows, tables, strict=True)
        ]
    )
    q = torch.randn(num_tokens, heads, head_size, generator=generator)
    return PagedCase(q, pages[0], pages[1], batch)


def reference(case: PagedCase, window: int | None = None) -> Tensor:
    """[T, H, D] float32."""
    parts = []
    batch = case.batch
    queries = case.q.float().split(batch.query_lengths)
    for own, context, table in zip(queries, batch.contexts, batch.block_tables, strict=True):
        keys, values = (
            _gathered(pages, table, context).repeat_interleave(own.size(1) // pages.size(1), 0)
            for pages in (case.k_pages, case.v_pages)
        )
        scores = own.transpose(0, 1) @ keys.mT * case.scale
        positions = torch.arange(context - own.size(0), context).unsqueeze(1)
        keyed = torch.arange(context).unsqueeze(0)
        hidden = keyed > positions
        if window is not None:
            hidden |= keyed <= positions - window
        scores = scores.masked_fill(hidden.to(scores.device), -math.inf)
        parts.append((scores.softmax(-1) @ values).transpose(0, 1))
    return torch.cat(parts)


def _gathered(pages: Tensor, table: Tensor, context: int) -> Tensor:
    """[K, context, D] float32."""
    used = table[: math.ceil(context / pages.size(2))].long()
    return pages[used].transpose(0, 1).flatten(1, 2)[:, :context].float()
