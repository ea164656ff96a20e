"""The waiting queue: one interface, and first come, first served (by priority).

``service.engine.fair_queue`` is the other one, of accounts that share the device.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import NamedTuple, Protocol

from service.engine.sequence import Sequence

_order = attrgetter("order")


class Standing(NamedTuple):
    """How one account stands in the queue."""

    num_choices: int
    tokens: int  # as the queue counts them
    share: float  # of the device, beside the others
    num_others: int  # accounts it shares with


class WaitingQueue(Protocol):
    """``len`` counts choices, ``tokens`` the prompt tokens of requests that never had a step."""

    @property
    def tokens(self) -> int: ...

    def add(self, sequence: Sequence) -> None: ...

    def push_front(self, sequence: Sequence) -> None:
        """Takes back one that has run before: to the front of its class."""

    def peek(self, may_run: Callable[[Sequence], bool] | None = None) -> Sequence | None:
        """Who is next of those that may run; ``remove`` takes it out once it can.

        ``may_run`` is asked in the order of the queue, until it agrees.
        """

    def remove(self, sequence: Sequence) -> None: ...

    def recount(self, sequence: Sequence, num_dropped: int) -> None:
        """A queued sequence has lost that many of its choices."""

    def adapters(self) -> set[int]:
        """Versions asked for."""

    def before(self, sequence: Sequence) -> Iterator[Sequence]:
        """Those that are to run before it, which need not be in the queue."""

    def standing(self, name: str, weight: float) -> Standing: ...

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Sequence]:
        """In the order in which they are to run."""


class FirstComeQueue:
    """Lowest priority number first, then by arrival.

    Within a priority everything that ever ran arrived before everything that did not, so the front
    of its class is simply its place by arrival.
    """

    def __init__(self) -> None:
        self._sequences: list[Sequence] = []  # sorted
        self._num_choices = 0
        self.tokens = 0

    def add(self, sequence: Sequence) -> None:
        insort(self._sequences, sequence, key=_order)
        self._num_choices += len(sequence.choices)
        self.tokens += _fresh_tokens(sequence)

    push_front = add

    def peek(self, may_run: Callable[[Sequence], bool] | None = None) -> Sequence | None:
        if may_run is not None:
            return next(filter(may_run, self._sequences), None)
        return self._sequences[0] if self._sequences else None

    def adapters(self) -> set[int]:
        return {sequence.adapter for sequence in self._sequences if sequence.adapter}

    def before(self, sequence: Sequence) -> Iterator[Sequence]:
        return (one for one in self._sequences if one.order < sequence.order)

    def standing(self, name: str, weight: float) -> Standing:
        return Standing(len(self), self.tokens, 1.0, 0)

    def remove(self, sequence: Sequence) -> None:
        i = bisect_left(self._sequences, sequence.order, key=_order)
        assert self._sequences[i] is sequence, "not in the queue"
        del self._sequences[i]
        self._num_choices -= len(sequence.choices)
        self.tokens -= _fresh_tokens(sequence)

    def recount(self, sequence: Sequence, num_dropped: int) -> None:
        self._num_choices -= num_dropped

    def __len__(self) -> int:
        return self._num_choices

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)


def _fresh_tokens(sequence: Sequence) -> int:
    return sequence.num_prompt if sequence.request.first_scheduled is None else 0
