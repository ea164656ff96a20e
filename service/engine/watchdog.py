"""Is the engine still getting somewhere? Judged from what it says and from its silence."""

from __future__ import annotations

import time
from collections.abc import Callable

from service.engine.messages import FromEngine, Outputs, State

STEP_PATIENCE = 10.0  # times a step's own estimate; a long prefill on a CPU is legitimate
LOADING_PATIENCE = 12.0  # times the patience: imports and compilers may hold the interpreter lock
LONG_PAUSE = 2.0  # seconds between two looks
WORKING = ("ready", "draining")


class Watchdog:
    """``heard`` every message; ``is_stalled`` when the engine is silent or its work stands still.

    Three ways to stand still: no message at all (frozen, or the interpreter lock is held), a step
    that takes ten times its estimate, work that waits while no step begins.
    """

    def __init__(self, patience: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._patience = patience
        self._clock = clock
        self._last_look = clock()
        self.reset()

    def reset(self) -> None:
        """A new engine: nothing is held against it."""
        self.state = State(stage="loading")  # the latest one, as the engine sent it
        self._last_heard = self._last_progress = self._clock()

    def heard(self, message: FromEngine) -> None:
        self._last_heard = self._clock()
        if isinstance(message, Outputs):
            self._last_progress = self._last_heard
        if isinstance(message, State):
            if self._has_moved(message):
                self._last_progress = self._last_heard
            self.state = message

    def silence(self) -> float:
        """Seconds since the last message."""
        return self._clock() - self._last_heard

    def look(self) -> bool:
        """Called often; True where the last call was long ago: then this process itself stood
        still, most likely with the whole machine, and that time is held against nobody."""
        now = self._clock()
        pause, self._last_look = now - self._last_look, now
        if pause < LONG_PAUSE:
            return False
        self._last_heard = min(now, self._last_heard + pause)
        self._last_progress = min(now, self._last_progress + pause)
        return True

    def is_stalled(self) -> bool:
        if self.silence() > self._allowed_silence():
            return True
        if self.state.stage not in WORKING:
            return False
        return self._clock() - self._last_progress > self._allowance()

    def describe(self) -> str:
        if self.silence() > self._allowed_silence():
            return f"no sign of life for {self.silence():.0f} s"
        return f"no step completed for {self._clock() - self._last_progress:.0f} s"

    def _has_moved(self, state: State) -> bool:
        """Idle counts as moving, and so does the first state of a new stage."""
        is_idle = state.running == 0 and state.waiting == 0 and state.step_elapsed == 0
        return is_idle or state.steps != self.state.steps or state.stage != self.state.stage

    def _allowance(self) -> float:
        return max(self._patience, STEP_PATIENCE * self.state.step_estimate)

    def _allowed_silence(self) -> float:
        is_working = self.state.stage in WORKING
        return self._patience if is_working else LOADING_PATIENCE * self._patience
