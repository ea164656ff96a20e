"""From one choice's tokens to its text: detokenizer, stop strings, what is said of each step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from service.engine.messages import Output, SamplingSettings, TokenLogprob
from service.redaction import Redacted


class Detokenizes(Protocol):
    """``model.detokenizer.Detokenizer``: two verbs."""

    def push(self, token: int) -> str: ...
    def flush(self) -> str: ...


class StopStrings:
    """Lets text through that can be no part of a stop string, and finds the one that ends first.

    The answer depends on the text alone, never on how it was cut into pushes: of several stop
    strings the one whose last character comes first wins, among those the longest. One
    Knuth-Morris-Pratt automaton a string, so the time is linear whatever the strings are.
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        self._automata = [_Automaton(stop) for stop in stops]
        self._include = include
        self._held = ""  # may be the beginning of a stop string

    def push(self, text: str, *, armed: bool = True) -> tuple[str, str | None]:
        """(text to show, the stop string that was completed). Not ``armed``: none counts yet."""
        if not self._automata or not text:
            return text, None
        held = self._held + text
        for position, character in enumerate(text, start=len(self._held) + 1):
            matched = self._step(character)
            if matched is not None and armed:
                self._held = ""
                end = position if self._include else position - len(matched)
                return held[:end], matched
        keep = max(automaton.matched for automaton in self._automata)
        shown = len(held) - keep
        self._held = held[shown:]
        return held[:shown], None

    def flush(self) -> str:
        """The end of the text: what was held back was no stop string after all."""
        held, self._held = self._held, ""
        return held

    def _step(self, character: str) -> str | None:
        """The longest stop string that ends with this character."""
        ended = [automaton.stop for automaton in self._automata if automaton.step(character)]
        return max(ended, key=len, default=None)


class _Automaton:
    """How many characters of ``stop`` the text so far ends with (fewer than all of them)."""

    def __init__(self, stop: str) -> None:
        assert stop, "an empty stop string would stop at once"
        self.stop = stop
        self.matched = 0
        self._borders = _borders(stop)

    def step(self, character: str) -> bool:
        """True when this character completes the stop string."""
        while self.matched and self.stop[self.matched] != character:
            self.matched = self._borders[self.matched - 1]
        if self.stop[self.matched] == character:
            self.matched += 1
        if self.matched == len(self.stop):
            self.matched = self._borders[-1]
            return True
        return False


def _borders(word: str) -> list[int]:
    """For each prefix the length of its longest proper prefix that is also its suffix."""
    borders = [0] * len(word)
    for end in range(1, len(word)):
        length = borders[end - 1]
        while length and word[length] != word[end]:
            length = borders[length - 1]
        borders[end] = length + (word[length] == word[end])
    return borders


@dataclass(slots=True, repr=False)
class TokenNews(Redacted):
    """One token with its log-probabilities; ``offset`` is where its text begins in the answer."""

    token: int
    logprob: TokenLogprob | None  # None: the first token of a prompt has none
    offset: int


@dataclass(slots=True, repr=False)
class Event(Redacted):
    """What one choice of an answer gained. The last of a choice carries ``finish_reason``."""

    index: int  # prompt-major over prompts and n
    pieces: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)  # where each token's text begins
    logprobs: list[TokenNews] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    is_first: bool = False
    num_tokens: int = 0  # that count as generated; an echoed prompt's do not
    prompt_logprobs: list[TokenLogprob | None] | None = None  # with the first event
    pooled: bytes | None = None  # what the engine pooled, float32

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def extend(self, later: Event) -> None:
        """Both as one: how a stream is joined to a whole answer."""
        self.pieces += later.pieces
        self.tokens += later.tokens
        self.offsets += later.offsets
        self.logprobs += later.logprobs
        self.num_tokens += later.num_tokens
        self.finish_reason = later.finish_reason
        self.stop_reason = later.stop_reason
        if later.prompt_logprobs is not None:
            self.prompt_logprobs = later.prompt_logprobs


class ChoiceText:
    """Turns the outputs of one choice into events, and knows when its text has ended."""

    def __init__(
        self,
        index: int,
        settings: SamplingSettings,
        detokenizer: Detokenizes,
        stops: StopStrings,
        *,
        include_stop: bool = False,
        offset: int = 0,
    ) -> None:
        self.index = index
        self.is_finished = False
        self.has_started = False
        self.num_tokens = 0
        self._settings = settings
        self._detokenizer = detokenizer
        self._stops = stops
        self._include_stop = include_stop
        self._offset = offset  # characters of text before the next token's

    def push(self, output: Output) -> Event:
        """The event of this output; tokens past a stop string are dropped."""
        assert not self.is_finished, "a finished choice gains nothing"
        event = Event(self.index, is_first=not self.has_started)
        self.has_started = True
        silent = self._silent_token(output)
        for position, token in enumerate(output.tokens):
            self._note(event, token, output.logprobs[position] if output.logprobs else None)
            is_silent = silent and position == len(output.tokens) - 1
            text = "" if is_silent else self._detokenizer.push(token)
            if self._show(event, text):
                return event
        if output.finish_reason is not None:
            self._finish(event, output)
        return event

    def _silent_token(self, output: Output) -> bool:
        """Whether the last token is an end or stop id, which is no part of the text."""
        if output.finish_reason != "stop" or self._include_stop or not output.tokens:
            return False
        last = output.tokens[-1]
        return last in self._settings.eos_token_ids or last in self._settings.stop_token_ids

    def _note(self, event: Event, token: int, logprob: TokenLogprob | None) -> None:
        self.num_tokens += 1
        event.num_tokens += 1
        event.tokens.append(token)
        event.offsets.append(self._offset)
        if logprob is not None:
            event.logprobs.append(TokenNews(token, logprob, self._offset))

    def _show(self, event: Event, text: str) -> bool:
        """Add what may be shown of ``text``; True when it completed a stop string."""
        self._offset += len(text)
        armed = self.num_tokens >= self._settings.min_tokens
        shown, stop = self._stops.push(text, armed=armed)
        if shown:
            event.pieces.append(shown)
        if stop is not None:
            event.finish_reason, event.stop_reason = "stop", stop
            self.is_finished = True
        return self.is_finished

    def _finish(self, event: Event, output: Output) -> None:
        """The engine ended the choice: nothing is held back any longer."""
        if self._show(event, self._detokenizer.flush()):
            return
        if rest := self._stops.flush():
            event.pieces.append(rest)
        event.finish_reason, event.stop_reason = output.finish_reason, output.stop_reason
        self.is_finished = True
