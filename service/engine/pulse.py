"""The engine's heartbeat: its latest state, repeated at least once a second, whatever it does.

The main thread publishes between steps; a small thread repeats while a model loads or a step runs
long, and lets new front ends in. It touches nothing of the scheduler: states are immutable.
"""

from __future__ import annotations

import threading
import time

from msgspec.structs import replace

from service.engine.connections import Connections
from service.engine.messages import State

INTERVAL = 1.0  # seconds between two states at most
TICK = 0.25


class Pulse:
    """``publish`` what is true now; it is sent at once when ``urgent`` or a second has passed."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections
        self._lock = threading.Lock()
        self._state = State(stage="loading")
        self._sent_at = 0.0
        self._step_began: float | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="pulse", daemon=True)

    @property
    def state(self) -> State:
        return self._state

    def start(self) -> None:
        self.publish(self._state, urgent=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def publish(self, state: State, *, urgent: bool = False) -> None:
        with self._lock:
            self._state = state
        if urgent:
            self._send()
        else:
            self._repeat()

    def step_begins(self, estimate: float) -> None:
        """``estimate``: seconds the step should take; who watches allows a multiple of it."""
        with self._lock:
            self._step_began = time.monotonic()
            self._state = replace(self._state, step_estimate=estimate)

    def step_ends(self) -> float:
        """Seconds the step took."""
        with self._lock:
            assert self._step_began is not None, "no step was begun"
            elapsed = time.monotonic() - self._step_began
            self._step_began = None
        return elapsed

    def _beat(self) -> None:
        while not self._stopped.wait(TICK):
            self._connections.accept()
            self._repeat()

    def _repeat(self) -> None:
        if time.monotonic() - self._sent_at >= INTERVAL:
            self._send()

    def _send(self) -> None:
        """One sender at a time, so that no earlier state overtakes a later one."""
        with self._lock:
            self._sent_at = time.monotonic()
            began = self._step_began
            elapsed = self._sent_at - began if began is not None else 0.0
            self._connections.broadcast(replace(self._state, step_elapsed=elapsed))
