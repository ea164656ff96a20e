"""A token bucket whose takings may be corrected once it is known what was really used."""

from __future__ import annotations

import math
from dataclasses import dataclass

EPSILON = 1e-6  # of a request or token: what floats lose over years of refilling


@dataclass(eq=False, slots=True)
class Hold:
    """An amount taken before it is known how much is needed."""

    bucket: Bucket
    amount: float
    peak: float  # the highest level from then until the next hold

    def settle(self, used: float, now: float) -> None:
        """Once: ``used`` is kept, the rest comes back as far as there was room for it."""
        self.bucket.settle(self, used, now)


class Bucket:
    """Full at first, it gains ``capacity`` a ``period`` and never holds more than that.

    Whatever is taken, held and settled in whatever order: in any T seconds what was let in is at
    most ``capacity * (1 + T / period)``. For that a refund must not give back what refilling has
    given already: of a hold comes back what had room in the bucket at every moment since. Then the
    bucket is where it would be, had the hold been as small from the start.
    """

    def __init__(self, capacity: int, now: float, period: float = 60.0) -> None:
        self.capacity = capacity
        self.period = period
        self._level = float(capacity)
        self._now = now
        self._holds: list[Hold] = []  # open ones, oldest first

    @property
    def rate(self) -> float:
        return self.capacity / self.period

    def level(self, now: float) -> float:
        """Below 0 where more was used than held."""
        if now > self._now:  # a clock that goes back gives nothing twice
            self._level = min(self.capacity, self._level + (now - self._now) * self.rate)
            self._now = now
            if self._holds:
                self._holds[-1].peak = max(self._holds[-1].peak, self._level)
        return self._level

    def wait(self, amount: float, now: float) -> float:
        """Seconds until so much is there if nothing else is taken; infinite if it never is."""
        missing = amount - self.level(now)
        if missing <= EPSILON:
            return 0.0
        return math.inf if amount > self.capacity else missing / self.rate

    def seconds_to_full(self, now: float) -> float:
        return (self.capacity - self.level(now)) / self.rate

    def take(self, amount: float, now: float) -> None:
        self._level = self.level(now) - amount

    def hold(self, amount: float, now: float) -> Hold:
        self.take(amount, now)
        hold = Hold(self, amount, self._level)
        self._holds.append(hold)
        return hold

    def settle(self, hold: Hold, used: float, now: float) -> None:
        level, position = self.level(now), self._holds.index(hold)
        refund = hold.amount - used
        if refund > 0:
            refund = self._refill_since(position, refund)
        self._level = level + refund
        del self._holds[position]
        if position:
            before = self._holds[position - 1]
            before.peak = max(before.peak, hold.peak)
        if self._holds:
            self._holds[-1].peak = max(self._holds[-1].peak, self._level)

    def _refill_since(self, position: int, refund: float) -> float:
        """Make the past since a hold that much fuller, where there was room; what is left of it."""
        peak, left = -math.inf, refund
        for hold in self._holds[position:]:
            room = self.capacity - max(peak, hold.peak)
            had_room, left = left, min(left, room)
            before, peak = peak, max(peak, hold.peak)
            hold.peak += had_room if hold.peak <= before else min(refund, room)
        return left

    def resize(self, capacity: int, now: float) -> None:
        """What was used stays used."""
        grown = capacity - self.capacity
        self._level = self.level(now) + grown
        self.capacity = capacity
        for hold in self._holds:
            hold.peak += grown
