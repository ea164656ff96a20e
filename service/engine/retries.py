"""What outlives an engine: requests of which nothing was seen yet wait for the next one.

Those that were being computed when it died are suspects. They go first, one after the other, each
until it is past the point at which the engine had died; so guilt is told from company. What those
say that have passed is held back meanwhile, so that they can be computed anew should one after them
end this engine too. Then come those that had waited in the queue.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

from service.engine.attempt import Attempt
from service.engine.quarantine import Quarantine
from service.errors import EngineFailure, PronkError

logger = logging.getLogger("pronk.engine")

TRIAL = 30.0  # seconds for all suspects of one death; whoever is left then runs beside the others
PROBATION = 10.0  # seconds for which one suspect waits for the one before it


class Retries:
    """``send`` hands an attempt to the engine, and raises what its client is to be told instead."""

    def __init__(
        self, quarantine: Quarantine, patience: float, send: Callable[[Attempt], None]
    ) -> None:
        self._quarantine = quarantine
        self._patience = patience
        self._send = send
        self._parked: dict[int, Attempt] = {}  # in the order of their arrival
        self._suspects: set[int] = set()
        self._on_probation: Attempt | None = None

    @property
    def has_suspects(self) -> bool:
        return bool(self._suspects)

    def park(self, attempt: Attempt, *, is_suspect: bool = False) -> None:
        """Until ``send_rest``, its own deadline, or patience ends. Its client waits as accepted."""
        attempt.is_in_engine = False
        attempt.admit()
        self._parked[attempt.number] = attempt
        if is_suspect:
            self._suspects.add(attempt.number)
        left = attempt.time_left
        is_last = left is None or left > self._patience
        end = self._despair if is_last else self._expire
        wait = self._patience if is_last or left is None else max(0.0, left)
        attempt.timer = asyncio.get_running_loop().call_later(wait, end, attempt)

    def drop(self, attempt: Attempt) -> None:
        """It waits no more: its client left, or it was sent."""
        if self._parked.pop(attempt.number, None) is None:
            return
        self._suspects.discard(attempt.number)
        if attempt.timer is not None:
            attempt.timer.cancel()

    def fail_all(self, error: PronkError) -> None:
        """No engine will come."""
        for attempt in list(self._parked.values()):
            self.drop(attempt)
            attempt.fail(error)

    def _expire(self, attempt: Attempt) -> None:
        self.drop(attempt)
        attempt.expire()

    def _despair(self, attempt: Attempt) -> None:
        self.drop(attempt)
        attempt.fail(
            EngineFailure(
                f"the engine failed and was not back in {self._patience:.0f} s: try again"
            )
        )

    # ---- an engine is there

    async def try_suspects(self) -> None:
        """One after the other, each beside none but those that have passed."""
        loop = asyncio.get_running_loop()
        give_up = loop.time() + TRIAL
        tried: list[Attempt] = []
        try:
            while self._suspects:
                attempt = self._parked[min(self._suspects)]
                tried.append(attempt)
                if not await self._try(attempt, give_up):
                    logger.warning("%d suspects are left to run in company", len(self._suspects))
                    return
        finally:
            for attempt in tried:
                attempt.generation.release()

    async def _try(self, attempt: Attempt, give_up: float) -> bool:
        """False where there is no time left for this."""
        if (record := self._quarantine.find(attempt.submit)) is not None:
            attempt.progress = record.progress
        attempt.generation.hold()
        self._resend(attempt)
        try:
            async with asyncio.timeout_at(give_up):
                await attempt.passed.wait()
        except TimeoutError:
            return False
        self._note_passed(attempt)
        attempt.num_tries = 1  # whatever ends this engine, it is not at fault
        return True

    def _note_passed(self, attempt: Attempt) -> None:
        if attempt.is_in_engine:
            self._quarantine.note_passed(attempt.submit)

    def send_rest(self) -> None:
        for attempt in list(self._parked.values()):
            self._resend(attempt)

    def _resend(self, attempt: Attempt) -> None:
        self.drop(attempt)
        attempt.passed.clear()
        try:
            self._quarantine.refuse_convicted(attempt.submit)
            self._send(attempt)
        except PronkError as error:
            attempt.fail(error)

    async def wait_turn(self, attempt: Attempt, progress: int) -> None:
        """A suspect that its client has sent again: not beside another one, if that can be."""
        attempt.progress = progress
        before, self._on_probation = self._on_probation, attempt
        if before is not None:
            attempt.has_waited = True
            left = attempt.time_left
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PROBATION if left is None else min(PROBATION, left)):
                    await before.passed.wait()
                self._note_passed(before)
