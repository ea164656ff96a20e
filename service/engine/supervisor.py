"""Keeps one engine process alive: starts it, connects, watches, ends a stuck one, starts another.

What it learns goes to its ``Owner`` (the client); what a request means is none of its business.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections import Counter, deque
from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

from msgspec.structs import replace

from service.engine.flight_recorder import FlightRecorder
from service.engine.link import Link, connect
from service.engine.messages import Control, FromEngine, State, ToEngine
from service.engine.options import BEYOND_USE, OUT_OF_MEMORY, EngineOptions
from service.engine.process import WORKER, EngineProcess, make_socket_path, remove_socket
from service.engine.watchdog import Watchdog

logger = logging.getLogger("pronk.engine")


@dataclass(frozen=True)
class Patience:
    """How long to wait for what, in seconds, and how often to try again."""

    connect_interval: float = 0.02
    stop: float = 5.0  # for the engine to leave by itself before it is killed
    restart_delay: float = 0.5  # doubled with each attempt
    max_restart_delay: float = 15.0
    max_restarts: int = 5  # within restart_window; past it the engine stays "failed"
    restart_window: float = 600.0
    stalled_after: float = 10.0  # without progress; a step may take ten times its estimate
    grace: float = 2.0  # after its stacks are dumped, before a stalled one is killed
    watch_interval: float = 0.5
    connect: float = 120.0  # for the process to listen
    retry: float = 300.0  # a request of which nothing was seen waits for the next engine


# Why an engine ended, as it is counted.
KILLED = "killed"  # by a signal: an operator's, the kernel's for want of memory, a crash
STALLED = "stalled"
MEMORY = "out_of_memory"
DEVICE = "device"  # beyond use, or three steps in a row that raised
ENDED = "ended"  # in any other way
RESTART_REASONS = (KILLED, STALLED, MEMORY, DEVICE, ENDED)
BY_EXIT_CODE = {OUT_OF_MEMORY: MEMORY, BEYOND_USE: DEVICE}


class Owner(Protocol):
    """What the supervisor tells the client."""

    def received(self, message: FromEngine) -> None: ...
    def announced(self, state: State) -> None: ...
    def lost(self, reason: str, at_hand: Collection[int] = ()) -> None: ...


class Supervisor:
    """One engine process after the other until one may not be followed by another."""

    def __init__(
        self, options: EngineOptions, patience: Patience, owner: Owner, worker: str = WORKER
    ) -> None:
        self.restarts: Counter[str] = Counter(dict.fromkeys(RESTART_REASONS, 0))
        self.watchdog = Watchdog(patience.stalled_after)
        self._options = options
        self._patience = patience
        self._owner = owner
        self._worker = worker
        self._process: EngineProcess | None = None
        self._link: Link | None = None
        self._task: asyncio.Task[None] | None = None
        self._is_stopping = False
        self._has_served = False
        self._failure: str | None = None  # the reason the engine itself gave for not loading
        self._kind = ENDED  # of the end of the last one
        self._is_stuck = False

    @property
    def num_restarts(self) -> int:
        return self.restarts.total()

    @property
    def is_connected(self) -> bool:
        return self._link is not None

    @property
    def pid(self) -> int | None:
        """Process id of the engine, None between two of them."""
        return self._process.pid if self._process is not None else None

    def set_model(self, path: str, draft: str | None) -> None:
        assert self._task is None, "the engine is started already"
        self._options = replace(self._options, model=path, speculative_model=draft)

    def set_adapters(self, adapters: dict[str, str]) -> None:
        """What an engine started from now on loads: name to folder."""
        self._options = replace(self._options, adapters=adapters)

    def start(self) -> None:
        assert self._task is None, "started twice"
        self._owner.announced(State(stage="starting"))
        self._task = asyncio.create_task(self._run(), name="engine supervisor")

    async def stop(self) -> None:
        """End the engine, gently while it listens; nothing of it is left behind."""
        self._is_stopping = True
        if self._task is None:
            return
        self.send(Control(id=0, verb="shutdown"))
        if self.is_connected:
            await asyncio.wait([self._task], timeout=self._patience.stop)
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        self._task = None
        self._owner.announced(State(stage="stopped"))

    def send(self, message: ToEngine) -> None:
        """Nothing happens while there is no engine: what it owned ended with it."""
        if self._link is not None:
            self._link.send(message)

    # ---- one engine after the other

    async def _run(self) -> None:
        try:
            await self._supervise()
        except Exception as error:  # a bug here must not leave clients waiting for an engine
            logger.exception("the engine can no longer be supervised")
            self._owner.announced(State(stage="failed", reason=type(error).__name__))

    async def _supervise(self) -> None:
        restarts: deque[float] = deque()
        while True:
            reason = await self._run_engine()
            if self._is_stopping:
                return
            if self._failure is not None and not self._has_served:
                return  # the model cannot be loaded: trying again would not change that
            if not self._may_restart(restarts):
                self._owner.announced(State(stage="failed", reason=f"{reason}; gave up restarting"))
                return
            self.restarts[self._kind] += 1
            self._owner.announced(State(stage="restarting", reason=reason))
            logger.error("%s: restarting it", reason)
            delay = self._patience.restart_delay * 2 ** (len(restarts) - 1)
            await asyncio.sleep(min(delay, self._patience.max_restart_delay))

    def _may_restart(self, restarts: deque[float]) -> bool:
        """Note one more restart; False when there were too many of late."""
        now = time.monotonic()
        restarts.append(now)
        while restarts[0] < now - self._patience.restart_window:
            restarts.popleft()
        return len(restarts) <= self._patience.max_restarts

    async def _run_engine(self) -> str:
        """One engine from its start to its end; returns why it ended."""
        path = self._options.socket or make_socket_path()
        recorder = FlightRecorder.create()
        options = replace(
            self._options,
            socket=path,
            parent=os.getpid(),
            skip_bad_adapters=self._has_served,
            recorder=recorder.descriptor,
        )
        reason, self._failure = "the engine stopped", None
        self._kind, self._is_stuck = ENDED, False
        try:
            self.watchdog.reset()
            self._process = await EngineProcess.spawn(options, self._worker)
            await self._attend(self._process, path)
            if self._failure is None and not self._is_stopping:  # unready at once
                self._owner.announced(State(stage="restarting", reason="the engine has ended"))
            code = await self._process.end(self._patience.stop)
            reason = self._failure or self._explain(code)
        except OSError as error:
            reason = f"the engine process could not be started: {error.strerror}"
        finally:
            if self._process is not None:
                await self._process.kill()
            self._process = None
            remove_socket(path)
            at_hand = recorder.read()
            recorder.close()
            self._owner.lost(reason, at_hand)
        return reason

    def _explain(self, code: int) -> str:
        """In a line; what kind of end it was is kept."""
        if self._is_stuck:
            self._kind = STALLED
            return f"the engine was stuck ({self.watchdog.describe()})"
        self._kind = KILLED if code < 0 else BY_EXIT_CODE.get(code, ENDED)
        return f"the engine ended unexpectedly ({describe_exit(code)})"

    async def _attend(self, process: EngineProcess, path: str) -> None:
        """Connect and stay until the connection ends, which it does with the process."""
        link = await self._connect(process, path)
        if link is None:
            return
        self._link = link
        watch = asyncio.create_task(self._watch(process), name="engine watchdog")
        try:
            await link.closed
        finally:
            self._link = None
            link.close()
            watch.cancel()

    async def _connect(self, process: EngineProcess, path: str) -> Link | None:
        """Knock until somebody opens; None when the process ends first, or takes too long."""
        give_up = time.monotonic() + self._patience.connect
        while process.is_running and time.monotonic() < give_up:
            if link := await connect(path, self._receive):
                return link
            await asyncio.sleep(self._patience.connect_interval)
        return None

    def _receive(self, message: FromEngine) -> None:
        self.watchdog.heard(message)
        if isinstance(message, State):
            self._has_served = self._has_served or message.stage == "ready"
            if message.stage == "failed":
                self._failure = message.reason
            elif message.stage == "ready" and self.watchdog.is_stalled():
                message = self._stalled(message)
        self._owner.received(message)

    # ---- the one that is stuck

    async def _watch(self, process: EngineProcess) -> None:
        """Unready once it makes no progress, and ended soon after: it cannot be asked to stop."""
        while True:
            await asyncio.sleep(self._patience.watch_interval)
            if not self.watchdog.look() and self.watchdog.is_stalled():
                logger.warning("the engine is stuck: %s", self.watchdog.describe())
                self._owner.announced(self._stalled(self.watchdog.state))
                process.dump_stacks()
                if await self._stays_stuck():
                    self._is_stuck = True
                    process.kill_now()
                    return

    async def _stays_stuck(self) -> bool:
        """Through the grace, in which its stacks are written; a step that ends now saves it."""
        give_up = time.monotonic() + self._patience.grace
        while time.monotonic() < give_up:
            await asyncio.sleep(min(self._patience.watch_interval, self._patience.grace))
            if self.watchdog.look() or not self.watchdog.is_stalled():
                return False
        return True

    def _stalled(self, state: State) -> State:
        return replace(state, stage="stalled", reason=self.watchdog.describe())


def describe_exit(code: int) -> str:
    """``signal 9`` or ``exit code 3``."""
    return f"signal {-code}" if code < 0 else f"exit code {code}"
