"""How the prompts of several accounts share a step: piece by piece to the lowest level."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from heapq import heapify, heappop, heapreplace

from service.engine.account import Account
from service.engine.fair_queue import FairQueue
from service.engine.sequence import Sequence

MOST_TRIES = 8
MayRun = Callable[[Sequence], bool]


def share_out(
    running: Iterable[Sequence],
    fair: FairQueue,
    admit: Callable[[Sequence], bool],
    room: int,
    piece: int,
    may_run: MayRun | None = None,
) -> dict[Sequence, int]:
    """Tokens for each of those whose prompt goes on, and of those that wait and were let in.

    ``room`` tokens are given away, at most ``piece`` at a time while several accounts want them;
    each account pays at once. Within an account they go in order, one that waits and comes first
    before those that run. Who finds no room keeps no other account from running, until it is owed
    too much; after ``MOST_TRIES`` of them nobody else is let in, to bound what a step costs.
    """
    lines: dict[Account, deque[Sequence]] = {}
    for sequence in running:
        lines.setdefault(sequence.account, deque()).append(sequence)
    heap = [(one.level, -one.turn, one) for one in lines.keys() | fair.accounts()]
    heapify(heap)
    counts: dict[Sequence, int] = {}
    stuck: set[Account] = set()
    num_tries = 0
    while room > 0 and heap:
        account = heap[0][-1]
        line = lines.setdefault(account, deque())
        head = None if account in stuck else fair.peek_of(account, may_run)
        if head is not None and not (line and line[0].order < head.order):
            if admit(head):
                account.stuck_at = None
                line.appendleft(head)
            else:
                stuck |= _stuck_with(account, fair)
                num_tries += 1
                if num_tries == MOST_TRIES:
                    stuck.update(fair.accounts())
        elif line:
            sequence = line[0]
            done = counts.get(sequence, 0)
            due = sequence.num_due - done
            count = min(due, room if len(heap) == 1 else min(room, piece))
            counts[sequence] = done + count
            room -= count
            if count == due:
                line.popleft()
            fair.shares.charge(account, count)
            heapreplace(heap, (account.level, -account.turn, account))
        else:
            heappop(heap)
    return counts


def _stuck_with(account: Account, fair: FairQueue) -> set[Account]:
    """Whose heads find no room now that this one's does not."""
    fair.shares.note_stuck(account)
    return {account, *fair.accounts()} if fair.shares.is_overdue(account) else {account}
