"""A reader as a grammar: generators that stop at every character, so that text may come in pieces.

A bare ``yield`` asks for the next character, which is then ``self.current``; ``""`` is the end of
the text. What is read of a character is said at once, so the same text gives the same deltas,
joined, however it was cut.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Generator
from typing import TypeVar

from service.api.reading import CallDelta, Delta

Result = TypeVar("Result")
Reading = Generator[None, None, Result]
SPACE = " \t\n\r"


class Malformed(Exception):
    """What looked like a call is none."""


def make_call_id() -> str:
    return f"call_{secrets.token_hex(12)}"


class Scanner:
    """Contents and calls; a dialect says in ``answer`` how they are written.

    A call begins when its name is known and its arguments have begun; from there on arguments are
    said as they come. What turns out to be malformed, before or after, is content as it stands,
    from its opening on; a call that had begun is then marked broken.
    """

    reasoning_length = 0

    def __init__(
        self, *, most_calls: int | None = None, make_id: Callable[[], str] = make_call_id
    ) -> None:
        """Calls past ``most_calls`` are read and dropped."""
        self.current = ""
        self._make_id = make_id
        self._most_calls = most_calls
        self._num_calls = 0  # begun
        self._num_whole = 0
        self._held: list[str] | None = None  # the text of what may turn out to be malformed
        self._before = ("", 0, 0)  # the opening of that, calls begun and whole before it
        self._blank = ""  # between two texts, or around a call and then part of no content
        self._content: list[str] = []
        self._call_deltas: list[CallDelta] = []
        self._run = self._read()
        next(self._run)

    @property
    def has_calls(self) -> bool:
        return self._num_whole > 0

    def push(self, text: str) -> Delta:
        for character in text:
            self._advance(character)
        return self._take()

    def flush(self) -> Delta:
        self._advance("")
        return self._take()

    def answer(self) -> Reading[None]:
        """The grammar of a whole answer, with ``current`` at its first character."""
        raise NotImplementedError

    def _read(self) -> Reading[None]:
        yield
        yield from self.answer()
        while True:
            yield

    def _advance(self, character: str) -> None:
        self.current = character
        if self._held is not None:
            self._held.append(character)
        next(self._run)

    def _take(self) -> Delta:
        delta = Delta("".join(self._content), calls=_joined(self._call_deltas))
        self._content, self._call_deltas = [], []
        return delta

    # ---- what grammars say

    def say(self, text: str) -> None:
        """Content. White space waits for what follows it."""
        kept = text.rstrip(SPACE)
        if kept:
            self._content.append(self._blank + kept)
            self._blank = text[len(kept) :]
        else:
            self._blank += text

    def begin_call(self, name: str) -> None:
        self._num_calls += 1
        self._add(CallDelta(self._num_calls - 1, self._make_id(), name))

    def say_arguments(self, text: str) -> None:
        self._add(CallDelta(self._num_calls - 1, arguments=text))

    def end_arguments(self) -> None:
        self._num_whole += 1

    def _add(self, delta: CallDelta) -> None:
        if self._most_calls is None or delta.index < self._most_calls:
            self._call_deltas.append(delta)

    # ---- what grammars read

    def text_until(self, *markers: str) -> Reading[str]:
        """Content up to one of the markers, which is read and returned; "" at the text's end."""
        partial = ""
        while self.current:
            partial += self.current
            if partial in markers:
                yield
                return partial
            while partial and not any(marker.startswith(partial) for marker in markers):
                self.say(partial[0])
                partial = partial[1:]
            yield
        self.say(partial)
        return ""

    def rest_is_content(self) -> Reading[None]:
        yield from self.text_until()
        self.end_content()

    def end_content(self) -> None:
        """At the end of the text: blanks after a call are part of no content."""
        if self._blank and not self._num_calls:
            self._content.append(self._blank)
        self._blank = ""

    def attempt(self, grammar: Reading[None], opening: str = "") -> Reading[bool]:
        """Read by ``grammar``; False if the text did not obey it, and was content after all.

        ``opening`` was read before; blanks before it belong to it.
        """
        self._hold(self._blank + opening)
        self._blank = ""
        try:
            yield from grammar
        except Malformed:
            self.spoil()
            return False
        finally:
            self._held = None
        return True

    def keep(self) -> None:
        """What was read so far of an attempt is right, whatever follows."""
        self._hold("")

    def _hold(self, opening: str) -> None:
        self._held = [self.current]
        self._before = opening, self._num_calls, self._num_whole

    def spoil(self) -> None:
        """What was held is content, but for the character just looked at. At the end of the text a
        call that had begun stays one that was cut."""
        assert self._held is not None
        opening, num_calls, num_whole = self._before
        if not self.current and self._num_calls > num_calls:
            return
        for index in range(num_calls, self._num_calls):
            self._add(CallDelta(index, is_broken=True))
        self._num_whole = num_whole
        held = "".join(self._held)
        self.say(opening + (held[:-1] if self.current else held))

    def blanks(self) -> Reading[None]:
        while self.current and self.current in SPACE:
            yield

    def expect(self, text: str) -> Reading[None]:
        for character in text:
            if self.current != character:
                raise Malformed
            yield


def _joined(calls: list[CallDelta]) -> list[CallDelta]:
    """Neighbouring pieces of one call's arguments as one."""
    joined: list[CallDelta] = []
    for call in calls:
        is_more = joined and call.id is None and joined[-1].index == call.index
        if is_more and not (call.is_broken or joined[-1].is_broken):
            joined[-1].arguments += call.arguments
        else:
            joined.append(call)
    return joined
