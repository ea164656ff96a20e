"""Who gives up its place, so that an account below its share gets one.

A place is a running slot, or pages. An account with twice as much of them for its weight as one
that waits, even after some have passed from one to the other, gives up those of its youngest; to an
account without any, with as much. That can only bring both closer to their shares, so nothing goes
back and forth, and what is left is evened out as sequences end. What is given up is computed again,
or found in the prefix cache; a sequence gives way anew only when it has got as far again as it was
thrown back, so that at most every second token is computed in vain.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from operator import attrgetter

from service.engine.account import Account, rank
from service.engine.fair_queue import FairQueue
from service.engine.fair_share import FairShare
from service.engine.sequence import Sequence

MOST_TAKERS = 8  # accounts looked at in a step
EXCESS = 2.0  # times what another account holds for its weight
MayRun = Callable[[Sequence], bool]
_order = attrgetter("order")


@dataclass(slots=True)
class Holding:
    """What the running sequences of one account hold. ``sequences`` are in their order."""

    sequences: list[Sequence] = field(default_factory=list)
    slots: int = 0
    pages: int = 0

    def add(self, sequence: Sequence) -> None:
        insort(self.sequences, sequence, key=_order)
        self.slots += 1
        self.pages += len(sequence.block_table)

    def remove(self, sequence: Sequence) -> None:
        self.sequences.remove(sequence)
        self.slots -= 1
        self.pages -= len(sequence.block_table)


@dataclass(slots=True)
class Room:
    """What can be given out in one step."""

    slots: int
    pages: int
    tokens: int


def holdings_of(running: Iterable[Sequence]) -> dict[Account, Holding]:
    found: dict[Account, Holding] = {}
    for sequence in running:  # sorted
        holding = found.get(sequence.account)
        if holding is None:
            holding = found[sequence.account] = Holding()
        holding.sequences.append(sequence)
        holding.slots += 1
        holding.pages += len(sequence.block_table)
    return found


def by_share_of_pages(running: Iterable[Sequence]) -> list[Sequence]:
    """The last is the youngest of who holds the most pages for its weight; and so on without it."""
    held: dict[Account, int] = {}
    ranked = []
    for sequence in running:  # sorted
        account = sequence.account
        held[account] = held.get(account, 0) + len(sequence.block_table)
        ranked.append((held[account] / account.weight, sequence.order, sequence))
    ranked.sort(key=lambda entry: entry[:2])
    return [sequence for _, _, sequence in ranked]


class Yielding:
    """Plans only: whoever asks does what is planned."""

    def __init__(
        self,
        shares: FairShare,
        queue: FairQueue,
        pages_for: Callable[[Sequence], int],
        pages_freed: Callable[[Sequence], int],
    ) -> None:
        """``pages_for`` who wants to run, and those that come free where one stops."""
        self._shares = shares
        self._queue = queue
        self._pages_for = pages_for
        self._pages_freed = pages_freed

    def plan(
        self, running: list[Sequence], room: Room, may_run: MayRun | None = None
    ) -> list[Sequence]:
        """Those that have to stop running; nothing is changed but ``room``, which is used up."""
        if room.slots > 0 and room.pages >= sum(map(self._pages_for, self._first(may_run))):
            return []
        holdings = holdings_of(running)
        stopped: list[Sequence] = []
        for account in self._queue.accounts()[:MOST_TAKERS]:
            for taker in self._queue.waiting_of(account):
                if room.tokens <= 0:
                    return stopped
                if may_run is not None and not may_run(taker):
                    continue
                leaving = self._make_way(taker, holdings, room)
                if leaving is None:
                    break
                stopped += leaving
                if may_run is not None:
                    return stopped  # whom an adapter's slot is left for is known when it runs
        return stopped

    def _first(self, may_run: MayRun | None) -> list[Sequence]:
        head = self._queue.peek(may_run)
        return [] if head is None else [head]

    def _make_way(
        self, taker: Sequence, holdings: dict[Account, Holding], room: Room
    ) -> list[Sequence] | None:
        """Those that stop for it, taken off the books; None, and nothing done, if it must wait."""
        need = self._pages_for(taker)
        own = holdings.get(taker.account, Holding())
        slots, pages, leaving = room.slots, room.pages, list[Sequence]()
        while slots < 1 or pages < need:
            if slots < 1:
                loser = self._loser(taker, holdings, own.slots + 1, _slots, _one)
            else:
                loser = self._loser(taker, holdings, own.pages + need, _pages, _table)
            if loser is None:
                for sequence in leaving:
                    holdings[sequence.account].add(sequence)
                return None
            holdings[loser.account].remove(loser)
            leaving.append(loser)
            slots += 1
            pages += self._pages_freed(loser)
        room.slots, room.pages = slots - 1, pages - need
        room.tokens -= taker.num_due
        own.slots, own.pages = own.slots + 1, own.pages + need
        holdings[taker.account] = own
        return leaving

    def _loser(
        self,
        taker: Sequence,
        holdings: dict[Account, Holding],
        wanted: int,
        held: Callable[[Holding], int],
        size: Callable[[Sequence], int],
    ) -> Sequence | None:
        """Of the account with the most for its weight, the youngest that may be thrown back."""
        account = taker.account
        is_overdue = self._shares.is_overdue(account)
        least = wanted / account.weight * (EXCESS if account in holdings else 1.0)
        others = [one for one in holdings if one is not account and rank(one) > rank(account)]
        others.sort(key=lambda one: held(holdings[one]) / one.weight, reverse=True)
        for other in others:
            holding = holdings[other]
            if not is_overdue and least >= held(holding) / other.weight:
                break  # neither has this one enough, nor those after it
            for sequence in reversed(holding.sequences):
                left = (held(holding) - size(sequence)) / other.weight
                gains = is_overdue or least <= left
                if gains and sequence.may_yield:
                    return sequence
        return None


def _slots(holding: Holding) -> int:
    return holding.slots


def _pages(holding: Holding) -> int:
    return holding.pages


def _one(sequence: Sequence) -> int:
    return 1


def _table(sequence: Sequence) -> int:
    return len(sequence.block_table)
