"""How long a step should take, learned from those that were."""

from __future__ import annotations

WEIGHT = 0.2  # of the newest step in its average


class StepRates:
    """Average seconds for each power of two of tokens; an unseen size is scaled from those seen."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}

    def observe(self, num_tokens: int, seconds: float) -> None:
        size = num_tokens.bit_length()
        known = self._seconds.get(size, seconds)
        self._seconds[size] = known + WEIGHT * (seconds - known)

    def has_seen(self, num_tokens: int) -> bool:
        return num_tokens.bit_length() in self._seconds

    def estimate(self, num_tokens: int) -> float:
        """Seconds for a step of ``num_tokens``; 0 before anything was observed."""
        size = num_tokens.bit_length()
        if size in self._seconds:
            return self._seconds[size]
        return max(
            (seconds * max(1.0, 2.0 ** (size - known)) for known, seconds in self._seconds.items()),
            default=0.0,
        )
