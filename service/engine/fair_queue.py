"""The waiting queue of accounts that share: the account with the lowest level goes first.

Within an account it is first come, first served, by priority. A priority is the client's own word,
so it counts among the client's own requests alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from heapq import heapify, heappop, heappush

from service.engine.account import Account, rank
from service.engine.fair_share import DECODE_COST, FairShare
from service.engine.sequence import Sequence
from service.engine.waiting import FirstComeQueue, Standing

MayRun = Callable[[Sequence], bool]


class FairQueue:
    def __init__(self, shares: FairShare) -> None:
        self.shares = shares
        self._queues: dict[Account, FirstComeQueue] = {}  # none is empty
        self._num_choices = 0
        self.tokens = 0

    def add(self, sequence: Sequence) -> None:
        queue = self._queues.get(sequence.account)
        if queue is None:
            queue = self._queues[sequence.account] = FirstComeQueue()
        before = queue.tokens
        queue.add(sequence)
        self._num_choices += len(sequence.choices)
        self.tokens += queue.tokens - before

    push_front = add

    def remove(self, sequence: Sequence) -> None:
        account = sequence.account
        queue = self._queues[account]
        before = queue.tokens
        queue.remove(sequence)
        self._num_choices -= len(sequence.choices)
        self.tokens += queue.tokens - before
        if not queue:
            del self._queues[account]
            account.stuck_at = None

    def recount(self, sequence: Sequence, num_dropped: int) -> None:
        self._queues[sequence.account].recount(sequence, num_dropped)
        self._num_choices -= num_dropped

    # ---- who is next

    def accounts(self) -> list[Account]:
        """Those that wait, the lowest level first."""
        if len(self._queues) == 1:
            return list(self._queues)
        return sorted(self._queues, key=rank)

    def peek(self, may_run: MayRun | None = None) -> Sequence | None:
        if may_run is None:
            return self.peek_of(min(self._queues, key=rank)) if self._queues else None
        heads = (self.peek_of(account, may_run) for account in self.accounts())
        return next((head for head in heads if head is not None), None)

    def peek_of(self, account: Account, may_run: MayRun | None = None) -> Sequence | None:
        queue = self._queues.get(account)
        return None if queue is None else queue.peek(may_run)

    def waiting_of(self, account: Account) -> Iterator[Sequence]:
        return iter(self._queues.get(account, ()))

    def before(self, sequence: Sequence) -> Iterator[Sequence]:
        lines = {account: list(queue) for account, queue in self._queues.items()}
        own = lines.setdefault(sequence.account, [])
        own[:] = [one for one in own if one.order < sequence.order] + [sequence]
        for one in _played_through(lines):
            if one is sequence:
                return
            yield one

    # ---- what is in it

    def standing(self, name: str, weight: float) -> Standing:
        account = self.shares.preview(name, weight)
        queue = self._queues.get(account)
        num_others = len(self.shares.active) - (name in self.shares.active)
        return Standing(
            0 if queue is None else len(queue),
            0 if queue is None else queue.tokens,
            self.shares.share(account),
            num_others,
        )

    def adapters(self) -> set[int]:
        return set().union(*(queue.adapters() for queue in self._queues.values()))

    def __len__(self) -> int:
        return self._num_choices

    def __iter__(self) -> Iterator[Sequence]:
        return _played_through({account: list(queue) for account, queue in self._queues.items()})


def _played_through(lines: dict[Account, list[Sequence]]) -> Iterator[Sequence]:
    """As if each had its prompt computed, and paid for it, before the next one is let in."""
    heap = [(account.level, -account.turn, 0, account) for account in lines if lines[account]]
    heapify(heap)
    while heap:
        level, turn, place, account = heappop(heap)
        line = lines[account]
        yield line[place]
        if place + 1 < len(line):
            cost = line[place].num_due + DECODE_COST
            heappush(heap, (level + cost / account.weight, turn, place + 1, account))
