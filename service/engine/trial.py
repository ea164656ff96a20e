"""Sequences of a step that raised: each is computed alone next, so that the bad one is found.

Nobody else advances meanwhile; a trial takes as many steps as a sequence needs to get back to where
it was, and one token more.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from service.engine.sequence import Sequence, Status


class Trials:
    def __init__(self) -> None:
        self._waiting: deque[tuple[Sequence, int]] = deque()  # and its length when it failed

    def add(self, sequences: Iterable[Sequence]) -> None:
        known = {id(sequence) for sequence, _ in self._waiting}
        self._waiting.extend(
            (sequence, len(sequence.tokens)) for sequence in sequences if id(sequence) not in known
        )

    def current(self) -> Sequence | None:
        """Whose turn it is; None when all have passed, or are gone."""
        while self._waiting:
            sequence, length = self._waiting[0]
            if sequence.status is not Status.FINISHED and len(sequence.tokens) == length:
                return sequence
            self._waiting.popleft()
        return None
