"""FlashInfer's paged attention: its decode wrapper for lone tokens, its prefill wrapper for chunks.

Imported only where the package may be (``model.attention_cuda`` asks). FlashInfer works in two
stages: ``plan`` cuts a step's pages into work on the host and ``run`` launches that for one layer.
So a step is planned once and run in every layer. Its "HND" layout of pages is ours; pages are named
by lists laid end to end (indptr, indices) and the tokens in each row's last page.

Two things its signatures do not tell. ``plan`` writes into pinned memory of the wrapper and queues
a copy from there: planned again before that copy has run, a step would read the next one's plan,
and the host is a step ahead of the device here. So each wrapper waits for its last copy. And how a
row is split depends on its neighbours: unlike with our own kernels, bits may change with the batch.
"""

# T tokens, S sequences, H query heads, K key heads, D head size, P tokens a page

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from model.batch import Batch
from model.kv_cache import KVCache
from model.kv_format import format_name

HEAD_SIZES = (64, 128, 256)  # what both of its kernels, FA2 and FA3, are built for
# Split outputs in float32. 128 MB are recommended; 64 query heads over 4 key heads take 277.
WORKSPACE_BYTES = 384 << 20


def refusal(dtype: torch.dtype, head_size: int, pages: torch.dtype) -> str | None:
    """Why it cannot serve such a model over such pages, or None."""
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it computes in float16 and bfloat16, not {format_name(dtype)}"
    if head_size not in HEAD_SIZES:
        return f"it has heads of {', '.join(map(str, HEAD_SIZES))}, not of {head_size}"
    if pages not in (dtype, torch.float8_e4m3fn):
        return f"it reads no {format_name(pages)} pages in a {format_name(dtype)} model"
    return None


class Problem(NamedTuple):
    """All that a plan depends on but the rows."""

    heads: int
    kv_heads: int
    head_size: int
    page_size: int
    scale: float
    window: int | None
    dtype: torch.dtype
    pages: torch.dtype

    @classmethod
    def of(cls, q: Tensor, keys: Tensor, scale: float, window: int | None) -> Problem:
        kv_heads, page_size = keys.shape[1:3]
        return cls(q.size(1), kv_heads, q.size(2), page_size, scale, window, q.dtype, keys.dtype)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.heads, self.kv_heads, self.head_size, self.page_size

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "sm_scale": self.scale,
            # How many keys before its own a query sees; ours counts its own too.
            "window_left": -1 if self.window is None else self.window - 1,
            "q_data_type": self.dtype,
            "kv_data_type": self.pages,
        }


class FlashInfer:
    """The wrappers and the workspace they share, kept from step to step."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._decodes: dict[Problem, _Planned] = {}
        self._chunks: dict[Problem, _Planned] = {}

    @classmethod
    def beside(cls, cache: KVCache) -> FlashInfer:
        """The one of a cache, made at its first use."""
        kept = cache.kept.get(cls)
        if not isinstance(kept, cls):
            kept = cache.kept[cls] = cls(cache.keys[0].device)
        return kept

    def attend(
        self,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        batch: Batch,
        scale: float,
        window: int | None,
    ) -> Tensor:
        """[T, H, D] -> [T, H, D]; the first call of a step plans it."""
        problem = Problem.of(q, keys, scale, window)
        if isinstance(batch.fixed_plans, DecodePlans):
            return batch.fixed_plans.attend(q, keys, values, problem)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        rows = batch.num_decodes
        step = batch.prepared.setdefault(FlashInfer, object())  # a new one each step
        if rows:
            decodes = self._decodes.get(problem) or self._new_decodes(problem)
            if decodes.step is not step:
                decodes.plan(step, _Pages(batch.tables[:rows], batch.contexts[:rows], problem))
            decodes.wrapper.run(q[:rows], (keys, values), out=out[:rows])
        if rows < len(batch.query_lengths):
            chunks = self._chunks.get(problem) or self._new_chunks(problem)
            if chunks.step is not step:
                pages = _Pages(batch.tables[rows:], batch.contexts[rows:], problem)
                chunks.plan(step, pages, batch.query_lengths[rows:])
            chunks.wrapper.run(q[rows:], (keys, values), out=out[rows:])
        return out

    def decode_plans(self, rows: int, indices: Tensor) -> DecodePlans:
        """For a CUDA graph of so many rows; ``indices`` int32 has room for all their pages."""
        return DecodePlans(rows, indices, self._workspace)

    def _new_decodes(self, problem: Problem) -> _Planned:
        made = _Planned(problem, _decode_wrapper(self._workspace), self._device)
        self._decodes[problem] = made
        return made

    def _new_chunks(self, problem: Problem) -> _Planned:
        import flashinfer

        # Its own choice of kernels: FA3 on Hopper where pages are as wide as queries, else FA2.
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(self._workspace, "HND")
        made = _Planned(problem, wrapper, self._device)
        self._chunks[problem] = made
        return made


class DecodePlans:
    """Decoding wrappers over buffers that stay where they are: what a CUDA graph can hold.

    A graph replays kernels over these buffers, so ``plan`` before each replay is all that tells
    them of the step. The wrappers themselves are made in a first, eager pass.
    """

    def __init__(self, rows: int, indices: Tensor, workspace: Tensor) -> None:
        self._rows, self._indices, self._workspace = rows, indices, workspace
        self._planned: dict[Problem, _Planned] = {}
        self.plan([], [])

    def plan(self, tables: list[list[int]], contexts: list[int]) -> None:
        """The rows, filled up with padding: a first token in page 0, which nobody is given."""
        padding = self._rows - len(tables)
        self._tables = tables + [[0]] * padding
        self._contexts = contexts + [1] * padding
        for planned in self._planned.values():
            self._replan(planned)

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, problem: Problem) -> Tensor:
        if problem not in self._planned:
            wrapper = self._wrapper(q.device)
            self._planned[problem] = _Planned(problem, wrapper, q.device, is_fixed=True)
            self._replan(self._planned[problem])
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        self._planned[problem].wrapper.run(q, (keys, values), out=out)
        return out

    def _replan(self, planned: _Planned) -> None:
        planned.plan(object(), _Pages(self._tables, self._contexts, planned.problem))

    def _wrapper(self, device: torch.device) -> Any:
        return _decode_wrapper(
            self._workspace,
            use_cuda_graph=True,
            paged_kv_indptr_buffer=torch.zeros(self._rows + 1, dtype=torch.int32, device=device),
            paged_kv_indices_buffer=self._indices,
            paged_kv_last_page_len_buffer=torch.ones(self._rows, dtype=torch.int32, device=device),
        )


class _Pages:
    """Rows' pages as FlashInfer names them."""

    def __init__(self, tables: list[list[int]], contexts: list[int], problem: Problem) -> None:
        lengths = [len(table) for table in tables]
        self.starts = np.array([0, *itertools.accumulate(lengths)], np.int32)
        self.indices = np.fromiter(itertools.chain.from_iterable(tables), np.int32, sum(lengths))
        self.last = (np.array(contexts, np.int32) - 1) % problem.page_size + 1


class _Planned:
    """A wrapper and the step it was planned for last."""

    def __init__(
        self, problem: Problem, wrapper: Any, device: torch.device, *, is_fixed: bool = False
    ) -> None:
        self.problem, self.wrapper, self._device = problem, wrapper, device
        self.step: object | None = None
        self._is_fixed = is_fixed
        self._copied: torch.cuda.Event | None = None

    def plan(self, step: object, pages: _Pages, query_lengths: list[int] | None = None) -> None:
        """``query_lengths`` of chunks; without, every row is one token."""
        if self._copied is not None:
            self._copied.synchronize()
        starts, indices, last = self._staged(pages.starts, pages.indices, pages.last)
        if self._is_fixed:
            # Into its buffer it copies pages that lie on the host only once the device is idle.
            indices = indices.to(self._device, non_blocking=True)
        shape, settings = self.problem.shape, self.problem.settings
        if query_lengths is None:
            self.wrapper.plan(starts, indices, last, *shape, **settings)
        else:
            (queries,) = self._staged(np.array([0, *itertools.accumulate(query_lengths)], np.int32))
            self.wrapper.plan(queries, starts, indices, last, *shape, causal=True, **settings)
        self.step = step
        if self._device.type == "cuda":
            self._copied = self._copied or torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()

    def _staged(self, *arrays: np.ndarray[Any, np.dtype[np.int32]]) -> list[Tensor]:
        """On the host, where it plans, in one piece that the device can fetch without waiting."""
        sizes = [len(array) for array in arrays]
        joined = torch.from_numpy(np.concatenate(arrays))
        if self._device.type == "cuda":
            joined = joined.pin_memory()
        return list(torch.split(joined, sizes))


def _decode_wrapper(workspace: Tensor, **buffers: Any) -> Any:
    """On tensor cores: its other kernel knows some groups of heads only, and no wider steps."""
    import flashinfer

    return flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        workspace, "HND", use_tensor_cores=True, backend="fa2", **buffers
    )
