"""One request on its way through an engine, and through the next one where that one died."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from msgspec.structs import replace

from service.engine.generation import Generation
from service.engine.messages import DEADLINE, Output, Submit
from service.errors import ModelNotFound, PronkError

MOST_TRIES = 2  # the client's own, and one more by the server itself
SHORTEST = 0.001  # seconds: a deadline of 0 would be none


@dataclass(slots=True, eq=False)
class Attempt:
    """``progress`` are the tokens that the engine which died over it had given; what has given more
    (or has ended) ``passed``."""

    submit: Submit
    generation: Generation
    admission: asyncio.Future[None]
    arrival: float = field(default_factory=time.monotonic)
    num_sent: int = 0
    num_tries: int = 0  # engines that died while they computed it, and the one that does
    is_in_engine: bool = False
    has_waited: bool = False  # for its turn, before it was sent
    progress: int = 0
    passed: asyncio.Event = field(default_factory=asyncio.Event)
    timer: asyncio.TimerHandle | None = None  # ends its wait for another engine

    @property
    def number(self) -> int:
        return self.submit.id

    @property
    def is_tried_out(self) -> bool:
        return self.num_tries >= MOST_TRIES

    @property
    def time_left(self) -> float | None:
        """Seconds until it is over without a step; None: as long as it takes."""
        bounds = [b for b in (self.submit.deadline, self.submit.max_queue) if b is not None]
        return min(bounds) - self._age() if bounds else None

    def _age(self) -> float:
        return time.monotonic() - self.arrival

    def due(self, versions: Mapping[str, int]) -> Submit:
        """What is sent now: less time, and the adapter as the engine that is there counts it.

        What was sent before is owed: its client has been told that it is taken.

        Raises ``ModelNotFound`` where that engine could not load it.
        """
        submit = self.submit
        if not (self.num_sent or self.has_waited or submit.is_continuation):
            return submit
        version = submit.adapter_version
        if submit.adapter:
            version = versions.get(submit.adapter, 0)
            if not version:
                raise ModelNotFound(f"The adapter {submit.adapter!r} is not loaded any more.")
        return replace(
            submit,
            is_owed=self.num_sent > 0,
            deadline=self._less(submit.deadline),
            max_queue=self._less(submit.max_queue),
            adapter_version=version,
        )

    def _less(self, seconds: float | None) -> float | None:
        return None if seconds is None else max(SHORTEST, seconds - self._age())

    def note_progress(self) -> None:
        if self.generation.is_finished or self.generation.num_tokens > self.progress:
            self.passed.set()

    def admit(self) -> None:
        if not self.admission.done():
            self.admission.set_result(None)

    def fail(self, error: PronkError) -> None:
        """Its one end: refused where it had not been accepted, else what its reader gets last."""
        self.is_in_engine = False
        self.passed.set()
        if self.admission.done():
            self.generation.fail(error)
        else:
            self.admission.set_exception(error)

    def expire(self) -> None:
        """Its time was over before it had a step: as the engine would have said it."""
        for choice in range(len(self.submit.settings)):
            self.generation.push(
                Output(
                    self.number,
                    choice,
                    [],
                    finish_reason="length",
                    stop_reason=DEADLINE,
                    cached_tokens=0 if choice == 0 else None,
                    queue_time=self._age() if choice == 0 else None,
                )
            )
        self.passed.set()
