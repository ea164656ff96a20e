"""Weighted fair shares of the device: what each account has had of it, as virtual time.

The virtual token counter of Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024):
an account's ``level`` rises by what the device computes for it, divided by its weight, and the
lowest goes first. Who was away begins at the lowest level of those that are here, so being idle
saves nothing up; who comes back early keeps the level it had.
"""

from __future__ import annotations

from collections.abc import Collection

from service.engine.account import Account
from service.engine.step import Row

DECODE_COST = 2.5  # of a row that decodes, in prompt tokens: see Decisions in service/README.md
MAX_IDLE = 4096  # accounts without requests whose level is remembered


class FairShare:
    """Keeps a level for every account with requests, and for those that left above the others."""

    def __init__(self, patience: float, max_idle: int = MAX_IDLE) -> None:
        """``patience``: device work owed to who finds no room, until everybody else makes it."""
        self.active: dict[str, Account] = {}
        self.work = 0.0  # charged to all accounts together
        self._patience = patience
        self._idle: dict[str, float] = {}  # levels above the lowest active one
        self._max_idle = max_idle
        self._num_turns = 0

    @property
    def is_contended(self) -> bool:
        return len(self.active) > 1

    @property
    def num_remembered(self) -> int:
        return len(self._idle)

    def join(self, name: str, weight: float) -> Account:
        """One more request of that account, whose weight is the newest one told."""
        account = self.active.get(name)
        if account is None:
            account = self.preview(name, weight)
            self._idle.pop(name, None)
            self._num_turns += 1
            self.active[name] = account
        account.weight = weight
        account.num_requests += 1
        return account

    def preview(self, name: str, weight: float) -> Account:
        """The account as it would be if a request of it came now; nothing is changed."""
        assert weight > 0, "a share of nothing"
        known = self.active.get(name)
        if known is not None:
            return known
        level = max(self._idle.get(name, 0.0), self._floor())
        return Account(name, weight, level, self._num_turns + 1)

    def leave(self, account: Account) -> None:
        """One request of it has ended. With nobody here nobody is owed anything: all forget."""
        account.num_requests -= 1
        if account.num_requests:
            return
        del self.active[account.name]
        if not self.active:
            self._idle.clear()
            return
        self._idle[account.name] = account.level
        if len(self._idle) > self._max_idle:
            self._forget()

    def charge(self, account: Account, cost: float) -> None:
        account.level += cost / account.weight
        self.work += cost

    def charge_only(self, cost: float) -> None:
        """To the one account that is here."""
        (account,) = self.active.values()
        self.charge(account, cost)

    def charge_decodes(self, rows: Collection[Row]) -> None:
        for row in rows:
            self.charge(row.sequence.account, DECODE_COST)

    def charge_guesses(self, rows: Collection[Row]) -> None:
        """Each is one more row that decodes."""
        for row in rows:
            if row.num_ahead:
                self.charge(row.sequence.account, DECODE_COST * row.num_ahead)

    # ---- who finds no room

    def note_stuck(self, account: Account) -> None:
        if account.stuck_at is None:
            account.stuck_at = self.work

    def is_overdue(self, account: Account) -> bool:
        """Whether its share of what was done since it is stuck is more than can be borne."""
        if account.stuck_at is None:
            return False
        owed = (self.work - account.stuck_at) * self.share(account)
        return owed > self._patience

    def share(self, account: Account) -> float:
        """Its part of the device beside the others that are here."""
        others = sum(other.weight for other in self.active.values() if other is not account)
        return account.weight / (account.weight + others)

    # ---- levels

    def _floor(self) -> float:
        return min((account.level for account in self.active.values()), default=0.0)

    def _forget(self) -> None:
        """Levels that say nothing any more, and if that is not enough the lowest others."""
        floor = self._floor()
        above = {name: level for name, level in self._idle.items() if level > floor}
        if len(above) > self._max_idle:
            ordered = sorted(above, key=above.__getitem__, reverse=True)
            above = {name: above[name] for name in ordered[: self._max_idle * 3 // 4]}
        self._idle = above
