"""How fast the engine works its queue off, for telling a refused client when to come again."""

from __future__ import annotations

import math


class DrainRate:
    """Exponentially averaged sequences finished and tokens computed per busy second.

    Before anything is measured it answers from a guess, whose weight fades like any old second's.
    """

    GUESSED_SECONDS = 2.0

    def __init__(
        self, horizon: float = 30.0, sequences: float = 2.0, tokens: float = 500.0
    ) -> None:
        self._horizon = horizon  # seconds after which a measurement has lost 63 % of its weight
        self._seconds = self.GUESSED_SECONDS
        self._sequences = sequences * self._seconds
        self._tokens = tokens * self._seconds
        self._last: float | None = None

    def observe(self, now: float, num_finished: int, num_tokens: int) -> None:
        """One step's work; the time since the call before counts as busy."""
        elapsed = 0.0 if self._last is None else max(now - self._last, 0.0)
        kept = math.exp(-elapsed / self._horizon)
        self._seconds = self._seconds * kept + elapsed
        self._sequences = self._sequences * kept + num_finished
        self._tokens = self._tokens * kept + num_tokens
        self._last = now

    def start(self, now: float) -> None:
        """Work begins (again): time before now was idle."""
        if self._last is None:
            self._last = now

    def pause(self) -> None:
        """Nothing to do: idle time says nothing about speed."""
        self._last = None

    def seconds_for(self, num_sequences: float, num_tokens: float) -> float:
        """Time to finish that many sequences and compute that many tokens, within [1, 60]."""
        needs = (num_sequences, self._sequences), (num_tokens, self._tokens)
        seconds = max(need * self._seconds / max(done, 1e-9) for need, done in needs)
        return min(max(seconds, 1.0), 60.0)
