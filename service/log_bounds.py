"""What clients cause must not fill a disk: lines have a length, and repeated ones a rate."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from dataclasses import dataclass

LONGEST = 8192  # characters of a message, or of one value beside it
BURST = 10  # lines of one kind that are written whatever their rate
RATE = 1.0  # lines of one kind a second after that
KINDS = 256  # remembered


def shorten(text: str) -> str:
    left_out = len(text) - LONGEST
    return text if left_out <= 0 else f"{text[:LONGEST]}... ({left_out} characters left out)"


@dataclass(slots=True)
class Allowance:
    lines: float
    at: float
    left_out: int = 0

    def take(self, now: float) -> bool:
        self.lines = min(BURST, self.lines + (now - self.at) * RATE)
        self.at = now
        if self.lines < 1:
            self.left_out += 1
            return False
        self.lines -= 1
        return True


class RepeatFilter(logging.Filter):
    """Thins out warnings and errors of one kind: one logger, one text before its arguments.

    The next line of the kind says how many were left out. Lower levels pass: no client causes
    them.
    """

    def __init__(self) -> None:
        super().__init__()
        self._kinds: OrderedDict[tuple[str, str], Allowance] = OrderedDict()

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING:
            return True
        kind = (record.name, str(record.msg)[:200])
        now = time.monotonic()
        allowance = self._kinds.setdefault(kind, Allowance(BURST, now))
        self._kinds.move_to_end(kind)
        if len(self._kinds) > KINDS:
            self._kinds.popitem(last=False)
        if not allowance.take(now):
            return False
        if allowance.left_out:
            record.left_out = allowance.left_out
            allowance.left_out = 0
        return True
