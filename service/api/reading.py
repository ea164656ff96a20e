"""What a chat answer's text is made of: contents, reasoning and calls, read as it grows."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

from service.redaction import Redacted


@dataclass(slots=True, repr=False)
class CallDelta(Redacted):
    """What one call gained. Its first one carries ``id`` and ``name``, the others arguments."""

    index: int  # which call of the choice
    id: str | None = None
    name: str | None = None
    arguments: str = ""  # more of the JSON text
    is_broken: bool = False  # it turned out to be none; all its text is content


@dataclass(slots=True, repr=False)
class Delta(Redacted):
    """What a choice gained, told apart."""

    content: str = ""
    reasoning: str = ""
    calls: list[CallDelta] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.content or self.reasoning or self.calls)

    def __add__(self, later: Delta) -> Delta:
        return Delta(
            self.content + later.content, self.reasoning + later.reasoning, self.calls + later.calls
        )

    def whole_calls(self) -> list[CallDelta]:
        """One for each call, in the order they came; none for those that broke."""
        return [call for call in joined(self.calls) if not call.is_broken]


def joined(deltas: Iterable[CallDelta]) -> list[CallDelta]:
    """One for each call, in the order they came."""
    calls: dict[int, CallDelta] = {}
    for delta in deltas:
        call = calls.setdefault(delta.index, CallDelta(delta.index))
        call.id, call.name = call.id or delta.id, call.name or delta.name
        call.arguments += delta.arguments
        call.is_broken = call.is_broken or delta.is_broken
    return list(calls.values())


class AnswerReader(Protocol):
    """Reads one choice's text, piece by piece, however it is cut.

    Reading a whole text at once gives the same as its pieces, joined.
    """

    @property
    def has_calls(self) -> bool:
        """A whole call was read: ``finish_reason`` is ``tool_calls``."""

    @property
    def reasoning_length(self) -> int:
        """Characters of the text up to the end of its reasoning, endless while that goes on."""

    def push(self, text: str) -> Delta: ...
    def flush(self) -> Delta:
        """The end of the text: what was held back."""


class ReasoningCount:
    """Tokens of one choice's reasoning: those whose text begins before its end."""

    def __init__(self, reader: AnswerReader) -> None:
        self._reader = reader
        self._offsets: list[int] = []  # where each token's text begins

    def add(self, offsets: list[int]) -> None:
        self._offsets += offsets

    @property
    def num_tokens(self) -> int:
        return bisect_left(self._offsets, self._reader.reasoning_length)


class PlainText:
    """All of it is content."""

    has_calls = False
    reasoning_length = 0

    def push(self, text: str) -> Delta:
        return Delta(content=text)

    def flush(self) -> Delta:
        return Delta()
