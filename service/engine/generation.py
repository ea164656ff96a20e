"""One request as the HTTP process sees it: an iterator of ``Output``, merged for slow readers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from msgspec.structs import replace

from service.engine.messages import Output
from service.engine.tally import Tally
from service.errors import PronkError

FIRST_ONLY = ("prompt_tokens", "cached_tokens", "prompt_logprobs", "queue_time", "prefill_time")


class Generation:
    """Yields every choice's outputs until each has a finish reason, then ends.

    At most one pending output a choice: tokens that arrive before the reader comes are appended to
    it, so a slow reader holds at most n * max_tokens tokens. Raises what ``fail`` was told, when
    the engine died over it.
    """

    def __init__(
        self,
        number: int,
        num_choices: int,
        cancel: Callable[[int], None],
        tally: Tally | None = None,
    ) -> None:
        self.number = number
        self.tally = tally or Tally()
        self.num_discarded = 0  # tokens that nobody read: past a stop string, or after a hang-up
        self.num_cancels = 0  # told to the engine, which has not answered yet
        self.num_tokens = 0  # that have come
        self.has_given = False  # the reader has seen something of it
        self._num_choices = num_choices
        self._unfinished = set(range(num_choices))
        self._cancel = cancel
        self._pending: dict[int, Output] = {}  # in order of arrival
        self._failure: PronkError | None = None
        self._arrived = asyncio.Event()
        self._is_held = False

    @property
    def is_finished(self) -> bool:
        return not self._unfinished

    @property
    def has_failed(self) -> bool:
        """Its engine is gone: nothing can be told to it any more."""
        return self._failure is not None

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> Output:
        while self._is_held or not self._pending:
            if not self._is_held and self.is_finished:
                raise StopAsyncIteration
            if not self._is_held and self._failure is not None:
                raise self._failure
            self._arrived.clear()
            await self._arrived.wait()
        self.has_given = True
        return self._pending.pop(next(iter(self._pending)))

    def stop(self, choice: int) -> None:
        """A stop string was found in ``choice``: it gives nothing more and costs nothing more."""
        if choice in self._unfinished:
            self._unfinished.discard(choice)
            self._cancel(choice)
        self._discard(self._pending.pop(choice, None))
        self._arrived.set()

    def push(self, output: Output) -> None:
        """Called by the client for every output that names this generation."""
        self.tally.note(output)
        self.num_tokens += len(output.tokens)
        if output.choice not in self._unfinished:
            return self._discard(output)
        if output.finish_reason is not None:
            self._unfinished.discard(output.choice)
        earlier = self._pending.get(output.choice)
        self._pending[output.choice] = merge(earlier, output) if earlier else output
        self._arrived.set()
        return None

    def fail(self, error: PronkError) -> None:
        """Nothing more will come: what has arrived is still read, then the iterator raises."""
        self._failure = error
        self.release()

    def hold(self) -> None:
        """The reader sees nothing for now: what comes may have to be made anew."""
        self._is_held = True

    def release(self) -> None:
        self._is_held = False
        self._arrived.set()

    def restart(self) -> None:
        """It is to be computed anew: nobody has seen what had come of it."""
        assert not self.has_given, "its reader knows how it began"
        self._discard_pending()
        self._unfinished = set(range(self._num_choices))
        self.num_tokens = 0

    def close(self) -> None:
        """The reader left: count what it did not take."""
        self._discard_pending()
        self._unfinished.clear()
        self.release()

    def _discard_pending(self) -> None:
        for output in self._pending.values():
            self._discard(output)
        self._pending.clear()

    def _discard(self, output: Output | None) -> None:
        self.num_discarded += len(output.tokens) if output else 0


def merge(earlier: Output, later: Output) -> Output:
    """Both as one, in place of two: ``earlier``'s lists grow, so appending costs no copying."""
    earlier.tokens.extend(later.tokens)
    logprobs = earlier.logprobs
    if later.logprobs is not None:
        logprobs = earlier.logprobs or []
        logprobs.extend(later.logprobs)
    first = {
        name: getattr(earlier, name) for name in FIRST_ONLY if getattr(earlier, name) is not None
    }
    return replace(
        later,
        tokens=earlier.tokens,
        logprobs=logprobs,
        num_accepted=earlier.num_accepted + later.num_accepted,
        num_rejected=earlier.num_rejected + later.num_rejected,
        **first,
    )
