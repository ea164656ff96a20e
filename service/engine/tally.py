"""What engines did for one request of a client, over everything that was submitted for it."""

from __future__ import annotations

import time
from collections.abc import Callable

from service.engine.messages import Output


class Tally:
    """Counts what reached this process, whether or not anybody read it: late tokens as well.

    It is settled once every submit has ended for good: the engine said so, or is gone.
    """

    __slots__ = (
        "_first",
        "_last",
        "_num_open",
        "_when_settled",
        "began",
        "first_output",
        "num_cached",
        "num_drawn",
        "num_prompt",
        "prefill_seconds",
        "queue_seconds",
    )

    def __init__(self) -> None:
        self.num_prompt = 0  # tokens of the prompts that were computed, cached ones included
        self.num_cached = 0  # of these
        self.num_drawn = 0  # as the engine counts what it sent
        self.queue_seconds: float | None = None  # of the prompt that took longest, if many
        self.prefill_seconds: float | None = None
        self.began: float | None = None  # time.monotonic() of the first submit
        self.first_output: tuple[float, float, float] | None = None  # when, and its seconds
        self._first = self._last = 0.0
        self._num_open = 0
        self._when_settled: list[Callable[[], None]] = []

    @property
    def decode_seconds(self) -> float | None:
        """From the first tokens to the last."""
        return self._last - self._first if self.num_drawn else None

    def begin(self) -> None:
        """One more submit may bring outputs."""
        if self.began is None:
            self.began = time.monotonic()
        self._num_open += 1

    def note(self, output: Output) -> None:
        if output.prompt_tokens is not None:
            self.num_prompt += output.prompt_tokens
            self.num_cached += output.cached_tokens or 0
        if self.first_output is None and output.prefill_time is not None:
            queued = output.queue_time or 0.0
            self.first_output = time.monotonic(), queued, output.prefill_time
        if output.queue_time is not None:
            self.queue_seconds = max(self.queue_seconds or 0.0, output.queue_time)
        if output.prefill_time is not None:
            self.prefill_seconds = max(self.prefill_seconds or 0.0, output.prefill_time)
        if output.tokens:
            self._last = time.monotonic()
            self._first = self._first or self._last
            self.num_drawn += len(output.tokens)

    def end(self) -> None:
        """One of them has ended for good."""
        self._num_open -= 1
        if not self._num_open:
            told, self._when_settled = self._when_settled, []
            for tell in told:
                tell()

    def when_settled(self, tell: Callable[[], None]) -> None:
        """Called once, when nothing more can come; at once where that is so already."""
        if self._num_open:
            self._when_settled.append(tell)
        else:
            tell()
