"""How long a step takes by its number of decoding rows: what one row more would cost."""

from __future__ import annotations

from bisect import bisect_right

KNOTS = tuple(1 << power for power in range(11))  # rows
WEIGHT = 0.2  # of the newest step
KINSHIP = 0.25  # how far the sizes that were not seen follow those that were
FORGETTING = 0.002  # of what larger sizes cost more, with every step that did not see them
LEAP = 4.0  # a step that took more times its estimate than this tells of the machine, not of rows


class StepCosts:
    """Seconds by rows: straight lines between powers of two, never falling.

    Nothing known means that rows cost nothing: they are tried, and their cost is learned. What is
    seen at one size shifts the others too (contexts grow everywhere), and what was not seen for
    hundreds of steps is tried again, so that no size stays expensive only because it was once.
    """

    def __init__(self) -> None:
        self._seconds: list[float] = []  # at KNOTS

    def start(self, measured: list[tuple[int, float]]) -> None:
        """From (rows, seconds), measured at rest. Past the largest, rows cost in proportion."""
        known = sorted(measured)
        if known:
            self._seconds = [_between(known, knot) for knot in KNOTS]
            self._straighten()

    @property
    def is_known(self) -> bool:
        return bool(self._seconds)

    def seconds(self, rows: int) -> float:
        if not self._seconds:
            return 1.0
        left, share = _place(rows)
        if left == len(KNOTS) - 1:
            return self._seconds[-1] * rows / KNOTS[-1]
        return self._seconds[left] + share * (self._seconds[left + 1] - self._seconds[left])

    def observe(self, rows: int, seconds: float) -> None:
        if seconds <= 0.0:
            return  # a clock that stood still
        if not self._seconds:
            self._seconds = [seconds] * len(KNOTS)
            return
        ratio = min(LEAP, max(1 / LEAP, seconds / self.seconds(rows)))
        left, share = _place(rows)
        for knot in range(len(KNOTS)):
            near = 1 - share if knot == left else share if knot == left + 1 else 0.0
            self._seconds[knot] *= ratio ** (WEIGHT * max(near, KINSHIP))
            if knot > left and not near:
                self._seconds[knot] += FORGETTING * (self._seconds[left] - self._seconds[knot])
        self._straighten()

    def _straighten(self) -> None:
        """Of two sizes the larger takes no less time, whatever the machine's noise says."""
        for knot in range(1, len(KNOTS)):
            self._seconds[knot] = max(self._seconds[knot], self._seconds[knot - 1])


def _place(rows: int) -> tuple[int, float]:
    """The knot at or below, and how far on the way to the next one."""
    left = bisect_right(KNOTS, rows) - 1
    if left == len(KNOTS) - 1:
        return left, 0.0
    return left, (rows - KNOTS[left]) / (KNOTS[left + 1] - KNOTS[left])


def _between(known: list[tuple[int, float]], rows: int) -> float:
    """On the line between the neighbours; flat before the first, proportional past the last."""
    place = bisect_right(known, (rows, float("inf")))
    if place == 0:
        return known[0][1]
    before, seconds = known[place - 1]
    if place == len(known):
        return seconds * rows / before
    after, later = known[place]
    return seconds + (later - seconds) * (rows - before) / (after - before)
