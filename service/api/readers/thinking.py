"""Reasoning before an answer, told apart by its marks; what follows is another reader's."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from service.api.reading import AnswerReader, Delta


@dataclass(frozen=True, slots=True)
class Marks:
    open: str
    close: str


class ThinkingReader:
    """Only what an answer begins with is reasoning: its opening mark, or one the prompt ends with
    (``is_open``). Line breaks inside of the marks and after them belong to neither text."""

    def __init__(self, marks: Marks, answer: AnswerReader, *, is_open: bool = False) -> None:
        self.reasoning_length = sys.maxsize if is_open else 0
        self._marks = marks
        self._answer = answer
        self._is_open = is_open
        self._is_closed = False
        self._has_said = False  # reasoning, or content after it
        self._held = ""
        self._num_read = 0  # characters that are no longer held

    @property
    def has_calls(self) -> bool:
        return self._answer.has_calls

    def push(self, text: str) -> Delta:
        self._held += text
        delta = Delta()
        if not self._is_open and not self._is_closed:
            self._look_for_opening()
        if self._is_open:
            delta.reasoning = self._reason()
        if self._is_closed:
            delta += self._answer.push(self._rest())
        return delta

    def flush(self) -> Delta:
        if self._is_open:
            held, self._held = self._held, ""
            return Delta(reasoning=held.rstrip("\n") if self._has_said else held.strip("\n"))
        return self._answer.push(self._held) + self._answer.flush()

    def _look_for_opening(self) -> None:
        begun = self._held.lstrip()
        if begun.startswith(self._marks.open):
            self._drop(len(self._held) - len(begun) + len(self._marks.open))
            self._is_open, self.reasoning_length = True, sys.maxsize
        elif not self._marks.open.startswith(begun):
            self._is_closed = self._has_said = True  # no reasoning: nothing is stripped

    def _reason(self) -> str:
        end = self._held.find(self._marks.close)
        if end < 0:
            return self._say(self._certain())
        reasoning = self._held[:end].rstrip("\n")
        if not self._has_said:
            reasoning = reasoning.lstrip("\n")
        self._drop(end + len(self._marks.close))
        self._is_open, self._is_closed, self._has_said = False, True, False
        self.reasoning_length = self._num_read
        return reasoning

    def _certain(self) -> int:
        """How much of what is held can be neither the closing mark nor a break before it."""
        close = self._marks.close
        most = min(len(close) - 1, len(self._held))
        part = next(n for n in range(most, -1, -1) if self._held.endswith(close[:n]))
        return len(self._held[: len(self._held) - part].rstrip("\n"))

    def _say(self, size: int) -> str:
        if not self._has_said:
            blank = len(self._held) - len(self._held.lstrip("\n"))
            self._drop(blank)
            size = max(0, size - blank)
        said = self._held[:size]
        self._drop(size)
        self._has_said = self._has_said or bool(said)
        return said

    def _rest(self) -> str:
        """What goes to the answer: all, but for the line breaks after the reasoning."""
        text = self._held if self._has_said else self._held.lstrip("\n")
        self._drop(len(self._held))
        self._has_said = self._has_said or bool(text)
        return text

    def _drop(self, size: int) -> None:
        self._held = self._held[size:]
        self._num_read += size
