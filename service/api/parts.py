"""An answer as a row of parts: reasoning, texts and calls, each opened, grown and closed once.

What /v1/responses calls output items and /v1/messages content blocks. A whole answer is the same
changes, made at once: the text is read piece by piece, so that parts never depend on how the
engine's outputs were grouped.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from service.api.meter import Meter
from service.api.reading import AnswerReader, CallDelta, Delta
from service.api.text import Event, TokenNews
from service.redaction import Redacted

Kind = Literal["reasoning", "text", "call"]


@dataclass(slots=True, repr=False)
class Part(Redacted):
    index: int
    kind: Kind
    call: CallDelta | None = None  # a call's first: its index, id and name
    pieces: list[str] = field(default_factory=list)
    logprobs: list[TokenNews] = field(default_factory=list)  # a text's
    is_cut: bool = False  # it ended in its middle
    is_broken: bool = False  # a call that turned out to be none; its text stands in a text too

    @property
    def text(self) -> str:
        """Of a call: its arguments."""
        return "".join(self.pieces)


@dataclass(frozen=True, slots=True, repr=False)
class Change(Redacted):
    what: Literal["opened", "grew", "closed"]
    part: Part
    text: str = ""  # what it gained
    logprobs: list[TokenNews] = field(default_factory=list)


class AnswerParts:
    """Reads the events of one choice. There is always a part: an empty text where nothing is said.

    Log-probabilities go to the text that their tokens stand in; those of reasoning, of calls and of
    what announces them are nobody's.
    """

    def __init__(self, reader: AnswerReader) -> None:
        self.parts: list[Part] = []
        self._reader = reader
        self._open: Part | None = None
        self._news: list[TokenNews] = []  # of tokens whose text has not come
        self._pending: list[TokenNews] = []  # of tokens that no part has yet
        self._offset = 0  # characters read
        self._offsets: list[int] = []  # of all tokens

    @property
    def kept(self) -> list[Part]:
        """What the answer is made of in the end: a stream cannot take back a call that broke."""
        return [part for part in self.parts if not part.is_broken]

    @property
    def has_calls(self) -> bool:
        return self._reader.has_calls

    @property
    def num_reasoning_tokens(self) -> int:
        """Those that begin before the end of the reasoning, its closing mark included."""
        return bisect_left(self._offsets, self._reader.reasoning_length)

    def account(self, meter: Meter) -> None:
        """What only the text tells of the one choice that it is."""
        meter.num_reasoning = self.num_reasoning_tokens
        if self.has_calls and meter.endings.get(0) == "stop":
            meter.endings[0] = "tool_calls"

    def push(self, event: Event) -> Iterator[Change]:
        """To be taken one by one: a part grows on after its change was told."""
        return _joined(self._changes(event))

    def _changes(self, event: Event) -> Iterator[Change]:
        self._news += event.logprobs
        self._offsets += event.offsets
        for piece in event.pieces:
            self._offset += len(piece)
            self._take_news(self._offset)
            yield from self._grow(self._reader.push(piece))
        if event.finish_reason is not None:
            yield from self._grow(self._reader.flush())
            yield from self._finish(is_cut=event.finish_reason != "stop")

    def _take_news(self, end: int) -> None:
        """Tokens whose text begins before ``end`` are told with what is read now."""
        count = 0
        while count < len(self._news) and self._news[count].offset < end:
            count += 1
        self._pending += self._news[:count]
        del self._news[:count]

    def _finish(self, *, is_cut: bool) -> Iterator[Change]:
        if self._open is None:
            yield self._start("text")
        part = self._open
        assert part is not None, "it was opened"
        if part.kind == "text":
            part.logprobs += self._pending + self._news
        part.is_cut = is_cut
        yield Change("closed", part)

    def _grow(self, delta: Delta) -> Iterator[Change]:
        broken = {call.index for call in delta.calls if call.is_broken}
        for index in broken:
            yield from self._break(index)
        if delta.reasoning:
            yield from self._add("reasoning", delta.reasoning)
        if delta.content:
            yield from self._add("text", delta.content)
        for call in delta.calls:
            if call.index not in broken:
                yield from self._add("call", call.arguments, call)

    def _add(self, kind: Kind, text: str, call: CallDelta | None = None) -> Iterator[Change]:
        if not self._goes_on(kind, call):
            if self._open is not None:
                yield Change("closed", self._open)
            yield self._start(kind, call)
        part, pending = self._open, self._pending
        assert part is not None, "it was opened"
        self._pending = []
        if kind != "text":
            pending = []
        if text:
            part.pieces.append(text)
            part.logprobs += pending
            yield Change("grew", part, text, pending)

    def _break(self, index: int) -> Iterator[Change]:
        for part in self.parts:
            if part.call is not None and part.call.index == index:
                part.is_cut = part.is_broken = True
                if part is self._open:
                    self._open = None
                    yield Change("closed", part)

    def _goes_on(self, kind: Kind, call: CallDelta | None) -> bool:
        if self._open is None or self._open.kind != kind:
            return False
        return call is None or (self._open.call is not None and self._open.call.index == call.index)

    def _start(self, kind: Kind, call: CallDelta | None = None) -> Change:
        self._open = Part(len(self.parts), kind, call)
        self.parts.append(self._open)
        return Change("opened", self._open)


def _joined(changes: Iterator[Change]) -> Iterator[Change]:
    """Growth in a row as one change: events that were merged for a slow reader stay few."""
    held: Change | None = None
    for change in changes:
        if held is not None and change.what == "grew":
            logprobs = held.logprobs + change.logprobs
            held = Change("grew", held.part, held.text + change.text, logprobs)
            continue
        if held is not None:
            yield held
            held = None
        if change.what == "grew":
            held = change
        else:
            yield change
    if held is not None:
        yield held
