"""What a chat answer's text is made of: contents, reasoning and calls, read as it grows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol


@dataclass(slots=True)
class CallDelta:
    """What one call gained. Its first one carries ``id`` and ``name``, the others arguments."""

    index: int  # which call of the choice
    id: str | None = None
    name: str | None = None
    arguments: str = ""  # more of the JSON text
    is_broken: bool = False  # it turned out to be none; all its text is content


@dataclass(slots=True)
class Delta:
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
        """One for each call, in the order they came."""
        calls: dict[int, CallDelta] = {}
        for delta in self.calls:
            call = calls.setdefault(delta.index, CallDelta(delta.index))
            call.id, call.name = call.id or delta.id, call.name or delta.name
            call.arguments += delta.arguments
        return list(calls.values())


class AnswerReader(Protocol):
    """Reads one choice's text, piece by piece, however it is cut.

    Reading a whole text at once gives the same as its pieces, joined.
    """

    has_calls: bool  # a whole call was read: ``finish_reason`` is ``tool_calls``

    def push(self, text: str) -> Delta: ...
    def flush(self) -> Delta:
        """The end of the text: what was held back."""


class PlainText:
    """All of it is content."""

    has_calls = False

    def push(self, text: str) -> Delta:
        return Delta(content=text)

    def flush(self) -> Delta:
        return Delta()
