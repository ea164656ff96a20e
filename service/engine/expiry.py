"""Requests that may only take so long: which of them are out of time."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from service.engine.sequence import Request


class Expiries:
    """A heap of (time, request); entries of requests long finished are dropped lazily."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, bool, Request]] = []
        self._compact_at = 1024

    def add(self, request: Request) -> None:
        submit = request.submit
        if submit.deadline is not None:
            self._push(request.arrival + submit.deadline, False, request)
        if submit.max_queue is not None:
            self._push(request.arrival + submit.max_queue, True, request)
        if len(self._heap) > self._compact_at:
            self._compact()

    def due(self, now: float) -> Iterator[Request]:
        while self._heap and self._heap[0][0] <= now:
            _, _, only_queued, request = heapq.heappop(self._heap)
            if not (only_queued and request.first_scheduled is not None):
                yield request

    def __len__(self) -> int:
        return len(self._heap)

    def _push(self, when: float, only_queued: bool, request: Request) -> None:
        heapq.heappush(self._heap, (when, request.number, only_queued, request))

    def _compact(self) -> None:
        self._heap = [entry for entry in self._heap if entry[3].sequences]
        heapq.heapify(self._heap)
        self._compact_at = max(1024, 2 * len(self._heap))
