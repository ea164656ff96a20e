"""Host memory beside a KV cache: pages that had to make room, until they are asked for again.

On a processor a page is copied from memory to memory. On CUDA pages are gathered into a staging
buffer on the device, all layers of a page side by side, and cross the bus in one piece a page, on a
stream of its own: the step that overwrites a page waits for the gathering alone. All traffic of the
bus is in that stream's order, so a slot is never written before what was read from it has left.
"""

# N pages, K key heads, P tokens a page, D head size

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from model.kv_cache import KVCache, as_bytes, zeros
from model.transfers import to_device

Moves = list[tuple[int, int, int]]  # (from, to, first tokens)

STAGED = 4  # pages that are on their way at a time; so many more are held on the device, twice

log = logging.getLogger(__name__)


class HostCache:
    """``num_slots`` pages of a cache, ``page_bytes`` each.

    ``staged`` pages are moved together through staging buffers; None: where the cache's device has
    memory of its own.
    """

    def __init__(self, cache: KVCache, num_slots: int, staged: int | None = None) -> None:
        self.num_slots = num_slots
        self._cache = cache
        self._device = cache.keys[0].device
        self.page_bytes = sum(part[0, 0].nbytes * 2 for part in _pools(cache))
        self._slots = zeros((num_slots, self.page_bytes), torch.uint8, "cpu")
        is_apart = self._device.type == "cuda"
        if is_apart:
            _pin(self._slots)
        if staged is None:
            staged = STAGED if is_apart else 0
        self._staged = staged
        if staged:
            self._outward, self._inward = (_Staging(cache, staged, self.page_bytes) for _ in "12")
            self._stream: torch.cuda.Stream | None = None
            if is_apart:
                self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        else:
            self._parts = _parts(self._slots, cache)

    def store(self, stores: Moves) -> None:
        """(page, slot, first tokens), one after another: before anything writes those pages."""
        if not self._staged:
            for page, slot, tokens in stores:
                for part, pool in zip(self._parts, _pools(self._cache), strict=True):
                    part[slot, :, :, :tokens] = pool[:, page, :, :tokens]
            return
        for some in _batches(stores, self._staged):
            staging = self._outward
            staging.wait()  # until the pages staged last have left
            staging.gather([page for page, _, _ in some])
            staging.mark()
            with self._on_stream():
                staging.wait()
                for place, (_, slot, _) in enumerate(some):
                    self._slots[slot].copy_(staging.buffer[place], non_blocking=True)
                staging.mark()

    def load(self, loads: Moves) -> None:
        """(slot, page, first tokens): before the step's forward. More of a page may be written."""
        if not self._staged:
            for slot, page, tokens in loads:
                for part, pool in zip(self._parts, _pools(self._cache), strict=True):
                    pool[:, page, :, :tokens] = part[slot, :, :, :tokens]
            return
        for some in _batches(loads, self._staged):
            staging = self._inward
            with self._on_stream():
                staging.wait()  # until the pages staged last are in their places
                for place, (slot, _, _) in enumerate(some):
                    staging.buffer[place].copy_(self._slots[slot], non_blocking=True)
                staging.mark()
            staging.wait()
            staging.scatter([page for _, page, _ in some])
            staging.mark()

    def _on_stream(self) -> AbstractContextManager[object]:
        return contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


class _Staging:
    """Some pages on the device as the host holds them, and who is to wait for whom."""

    def __init__(self, cache: KVCache, num_pages: int, page_bytes: int) -> None:
        device = cache.keys[0].device
        self.buffer = torch.zeros(num_pages, page_bytes, dtype=torch.uint8, device=device)
        self._cache = cache
        self._parts = _parts(self.buffer, cache)
        self._event = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def mark(self) -> None:
        """What is queued on the current stream so far is what the next one waits for."""
        if self._event is not None:
            self._event.record()

    def wait(self) -> None:
        """The current stream waits, not the host."""
        if self._event is not None:
            self._event.wait()

    def gather(self, pages: list[int]) -> None:
        index = to_device(torch.tensor(pages), self.buffer.device)
        for part, pool in zip(self._parts, _pools(self._cache), strict=True):
            part[: len(pages)] = pool.index_select(1, index).transpose(0, 1)

    def scatter(self, pages: list[int]) -> None:
        index = to_device(torch.tensor(pages), self.buffer.device)
        for part, pool in zip(self._parts, _pools(self._cache), strict=True):
            pool.index_copy_(1, index, part[: len(pages)].transpose(0, 1))


def _pools(cache: KVCache) -> list[Tensor]:
    """Each layer's pages [2, N, K, P, D], then each layer's scales [2, N, K, P]."""
    return [as_bytes(layer) for layer in cache.layers] + cache.scales


def _parts(buffer: Tensor, cache: KVCache) -> list[Tensor]:
    """Where each pool's share lies in rows of bytes, a row a page: [rows, 2, K, P, D]."""
    parts, start = [], 0
    for pool in _pools(cache):
        shape = (len(buffer), 2, *pool.shape[2:])
        size = 2 * pool[0, 0].nbytes
        parts.append(buffer[:, start : start + size].view(pool.dtype).view(shape))
        start += size
    return parts


def _batches(moves: Moves, size: int) -> Iterator[Moves]:
    for start in itertools.count(0, size):
        if start >= len(moves):
            return
        yield moves[start : start + size]


def _pin(memory: Tensor) -> None:
    """Registers memory with CUDA, so that the device copies it while the host goes on.

    Not ``pin_memory``: its allocator rounds up to a power of two.
    """
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    error = runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)
    if int(error) != 0:
        log.warning("the host cache's memory could not be pinned (%s): copies will be slow", error)
