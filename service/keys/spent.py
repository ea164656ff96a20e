"""Tokens each key has spent in UTC's days and months: what quotas are held against.

The seam to whatever keeps records over restarts is one function, ``SpentTokens``. It is asked once
for a key, when a quota is first held against it; from there on this process counts itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

SpentTokens = Callable[[str, float], int]
"""(key id, since: seconds since the epoch) -> tokens of its requests that ended since then."""

DAY = 86_400
KEPT = 31  # days: no month has more


def nothing(key_id: str, since: float) -> int:
    """The history of a server that keeps no records: quotas begin anew with each start."""
    return 0


@dataclass(frozen=True, slots=True)
class Window:
    """A day or month of UTC's, as seconds since the epoch."""

    start: float
    end: float


def day_of(now: float) -> Window:
    start = now // DAY * DAY
    return Window(start, start + DAY)


def month_of(now: float) -> Window:
    start = datetime.fromtimestamp(now, UTC).replace(
        day=1, hour=0, minute=0, second=0, microsecond=0
    )
    end = (start + timedelta(days=KEPT)).replace(day=1)
    return Window(start.timestamp(), end.timestamp())


@dataclass
class Spent:
    """One key's tokens by day. Clocks that jump find the day they jump to as it was left."""

    _days: dict[float, int] = field(default_factory=dict)  # start of a day: tokens

    @classmethod
    def until(cls, now: float, key_id: str, history: SpentTokens) -> Spent:
        """Of the month before today all that matters is how much it was."""
        today, month = day_of(now).start, month_of(now).start
        spent_today = history(key_id, today)
        days = {month: max(0, history(key_id, month) - spent_today)}
        days[today] = days.get(today, 0) + spent_today
        return cls(days)

    def add(self, tokens: int, now: float) -> None:
        today = day_of(now).start
        self._days[today] = self._days.get(today, 0) + tokens
        if len(self._days) > KEPT:
            del self._days[min(self._days)]

    def within(self, window: Window) -> int:
        return sum(n for day, n in self._days.items() if window.start <= day < window.end)
