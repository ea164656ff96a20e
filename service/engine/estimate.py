"""What requests would cost if they came now: a look ahead in integers and learned seconds.

Slots and the order of prompts are played through; pages only where the first of the new prompts
finds no room. Others' answers are taken to be as long as answers were lately.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Collection
from heapq import heapify, heappop, heappush
from typing import NamedTuple

from service.engine.sequence import Sequence

Seconds = Callable[[int], float]  # of a step, by its tokens


class Passage(NamedTuple):
    """Seconds from now of one prompt and its choices."""

    start: float  # its first token is computed
    first: float  # its answers begin
    end: float  # the last of them is through its budget


class Forecast:
    """``running`` first, then whoever is taken in, in that order."""

    def __init__(
        self,
        running: Iterable[Sequence],
        num_slots: int,
        budget: int,
        usual_length: float,
        prompt_seconds: Seconds,
        decode_seconds: Seconds,
        num_new: int,
    ) -> None:
        """``usual_length`` of answers, ``num_new`` the choices asked about: they decode too."""
        line = list(running)
        self._rows = min(num_slots, len(line) + num_new)
        self._budget = max(1, budget - len(line))
        self._num_decoding = len(line)
        self._usual_length = usual_length
        self._prompt_seconds = prompt_seconds
        self._step = decode_seconds(max(1, self._rows))
        self._free = num_slots - len(line)
        self._clock = 0.0  # when the prompts taken in so far are computed
        self._ends: list[float] = []
        for sequence in line:
            if sequence.num_due > 1:
                self._clock += self.prefill(sequence.num_due)
            self._ends.append(self._clock + self._rest(sequence) * self._step)
        heapify(self._ends)

    def prefill(self, num_tokens: int) -> float:
        """Seconds to compute so many prompt tokens beside the rows that decode."""
        chunks, rest = divmod(num_tokens, self._budget)
        whole = self._prompt_seconds(self._budget + self._num_decoding) if chunks else 0.0
        last = self._prompt_seconds(rest + self._num_decoding) if rest else 0.0
        return chunks * whole + last

    def _rest(self, sequence: Sequence) -> float:
        """Tokens that one who is here will likely still say."""
        left = sequence.settings.max_tokens - sequence.num_output
        return max(1.0, min(left, self._usual_length - sequence.num_output))

    def wait_in_line(self, waiting: Iterable[Sequence]) -> None:
        for sequence in waiting:
            usual = [self._rest(sequence) for _ in sequence.choices]
            self.take_in(sequence.num_due, usual)

    def take_in(
        self, num_tokens: int, lengths: Collection[float], *, has_room: bool = True
    ) -> Passage:
        """Without room in the cache it waits for somebody's end, if anybody is here."""
        start = max(self._clock, self._slot())
        if not has_room and self._ends:
            start = max(start, self._ends[0])
        first = start + self.prefill(num_tokens)
        self._clock = last = first
        for number, length in enumerate(lengths):
            begin = max(first, self._slot()) if number else first
            end = begin + length * self._step
            heappush(self._ends, end)
            last = max(last, end)
        return Passage(start, first, last)

    def _slot(self) -> float:
        """When the next one is free; it is taken."""
        if self._free > 0:
            self._free -= 1
            return 0.0
        return heappop(self._ends) if self._ends else 0.0
