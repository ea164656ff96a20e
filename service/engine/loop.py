"""The engine's loop: take commands, run a step, tell what came of it. Blocks when idle."""

from __future__ import annotations

import logging
from typing import Any, Generic, Protocol, TypeVar

from service.engine.adapter_desk import AdapterDesk
from service.engine.connections import Connections, Event, Lost
from service.engine.messages import (
    Accepted,
    Cancel,
    Control,
    Outputs,
    Refused,
    Reply,
    State,
    Submit,
)
from service.engine.pulse import Pulse
from service.engine.rates import StepRates
from service.engine.scheduler import Deliveries, Scheduler
from service.engine.step import Step, StepResult
from service.errors import InvalidRequest, PronkError, Unavailable

logger = logging.getLogger("pronk.engine")

IDLE_WAIT = 1.0  # seconds: the heartbeat's
READING_WAIT = 0.02  # while an adapter is read in another thread
ASKED_TO_STOP, BEYOND_USE = 0, 4  # exit codes
MAX_FAILURES = 3  # steps in a row that raise; then a fresh process is the better hope
STEP_FAILED = "the engine failed on this request: send it again"


Launched = TypeVar("Launched")


class Runner(Protocol[Launched]):
    """What the loop needs of ``ModelRunner``."""

    def launch(self, step: Step) -> Launched: ...
    def collect(self, launched: Launched) -> StepResult: ...
    def is_fatal(self, error: Exception) -> bool: ...


class EngineLoop(Generic[Launched]):
    """``run`` until told to stop. Owns no tensor and no socket of its own."""

    def __init__(
        self,
        connections: Connections,
        pulse: Pulse,
        scheduler: Scheduler,
        runner: Runner[Launched],
        rates: StepRates,
        facts: dict[str, str],
        adapters: AdapterDesk[Any] | None = None,
    ) -> None:
        self._connections = connections
        self._pulse = pulse
        self._scheduler = scheduler
        self._runner = runner
        self._rates = rates
        self._facts = facts
        self._adapters = adapters
        self._early: list[Event] = []  # heard while a step was on the device
        self._num_steps = 0
        self._num_failures = 0  # in a row
        self._num_failed_steps = 0
        self._is_draining = False
        self._exit_code: int | None = None

    def run(self) -> int:
        """Serve; returns the process's exit code."""
        self._publish(urgent=True)
        while self._exit_code is None:
            self._take_commands()
            self._tend_adapters()
            self._send(self._scheduler.expire())
            step = self._scheduler.schedule()
            if step is not None:
                self._advance(step)
            self._publish()
        return self._exit_code

    # ---- commands

    def _take_commands(self) -> None:
        """Whatever has come in; waits for it only when there is nothing to compute."""
        early, self._early = self._early, []
        is_busy = bool(early) or self._scheduler.has_work
        is_reading = self._adapters is not None and self._adapters.is_reading
        wait = 0.0 if is_busy else READING_WAIT if is_reading else IDLE_WAIT
        for front_end, message in [*early, *self._connections.poll(wait)]:
            match message:
                case Submit():
                    self._submit(front_end, message)
                case Cancel():
                    self._scheduler.cancel(message.id, message.choice, front_end)
                case Lost():
                    self._scheduler.cancel_client(front_end)
                case Control():
                    self._control(front_end, message)

    def _submit(self, front_end: int, submit: Submit) -> None:
        """Exactly one answer, before any output."""
        try:
            if self._is_draining:
                raise Unavailable("the server is shutting down", code="draining", retry_after=1.0)
            self._scheduler.add(submit, front_end)
        except PronkError as error:
            self._connections.send(front_end, as_refused(submit.id, error))
        else:
            self._connections.send(front_end, Accepted(submit.id))

    def _control(self, front_end: int, control: Control) -> None:
        match control.verb:
            case "drain":
                self._is_draining = True
            case "shutdown":
                self._exit_code = ASKED_TO_STOP
            case "load_adapter" | "unload_adapter":
                return self._adapter_control(front_end, control)
        self._connections.send(front_end, Reply(control.id))
        return None

    def _adapter_control(self, front_end: int, control: Control) -> None:
        """Loading is answered once the files are read (``_tend_adapters``)."""
        try:
            if self._adapters is None:
                raise InvalidRequest("This server was started without adapters.")
            if control.verb == "load_adapter":
                return self._adapters.load(front_end, control)
            reply = self._adapters.unload(control)
        except PronkError as error:
            self._connections.send(front_end, as_refused(control.id, error))
        else:
            self._publish(urgent=True)
            self._connections.send(front_end, reply)
        return None

    def _tend_adapters(self) -> None:
        if self._adapters is None:
            return
        for front_end, control, answer in self._adapters.finished():
            if isinstance(answer, PronkError):
                self._connections.send(front_end, as_refused(control.id, answer))
            else:
                self._publish(urgent=True)  # before the reply: who hears it may use the adapter
                self._connections.send(front_end, answer)
        self._adapters.clear_away()

    # ---- steps

    def _advance(self, step: Step) -> None:
        self._pulse.step_begins(self._rates.estimate(step.num_tokens))
        try:
            launched = self._runner.launch(step)
            self._early += self._connections.poll(0)  # while the device computes
            result = self._runner.collect(launched)
        except Exception as error:
            result = self._failed(step, error)
        else:
            self._num_failures = 0
        seconds = self._pulse.step_ends()
        self._rates.observe(step.num_tokens, seconds)
        self._num_steps += 1
        self._send(self._scheduler.update(step, result), step, seconds)

    def _failed(self, step: Step, error: Exception) -> StepResult:
        """The step's own requests fail, the engine goes on; unless it cannot."""
        logger.error("step %d failed: %s", step.number, type(error).__name__, exc_info=error)
        self._num_failures += 1
        self._num_failed_steps += 1
        if self._runner.is_fatal(error) or self._num_failures >= MAX_FAILURES:
            logger.error("the device is beyond use: leaving, to be started again")
            self._exit_code = BEYOND_USE
        return StepResult.failed(step, STEP_FAILED)

    # ---- answers

    def _send(self, deliveries: Deliveries, step: Step | None = None, seconds: float = 0.0) -> None:
        """One message to every front end that had a part in the step, outputs or not."""
        rows = step.rows if step is not None else []
        for front_end in {row.sequence.request.client for row in rows} | deliveries.keys():
            assert isinstance(front_end, int)
            message = Outputs(
                step=step.number if step is not None else self._num_steps,
                num_scheduled_tokens=step.num_tokens if step is not None else 0,
                step_time=seconds,
                outputs=deliveries.get(front_end, []),
            )
            self._connections.send(front_end, message)

    def _publish(self, *, urgent: bool = False) -> None:
        """At once when something came or went, else when a second has passed."""
        gauges, told = self._scheduler.gauges(), self._pulse.state
        table = self._scheduler.adapters
        running, waiting = self._scheduler.adapters_in_use() if table.num_slots else ([], [])
        state = State(
            stage="draining" if self._is_draining else "ready",
            progress=1.0,
            steps=self._num_steps,
            running=gauges.running,
            waiting=gauges.waiting,
            waiting_tokens=gauges.waiting_tokens,
            num_blocks=self._scheduler.pool.num_usable,
            free_blocks=gauges.free_blocks,
            block_size=self._scheduler.pool.block_size,
            host_blocks=self._scheduler.pool.host.num_slots,
            used_host_blocks=self._scheduler.pool.host.num_used,
            max_model_len=self._scheduler.max_model_len,
            counters=self._scheduler.counters.as_dict() | {"failed_steps": self._num_failed_steps},
            facts=self._facts,
            step_estimate=told.step_estimate,
            adapters=dict(table.versions),
            running_adapters=running,
            waiting_adapters=waiting,
            max_loras=table.num_slots,
        )
        changed = (state.stage, state.running, state.waiting) != (
            told.stage,
            told.running,
            told.waiting,
        )
        self._pulse.publish(state, urgent=urgent or changed)


def as_refused(number: int, error: PronkError) -> Refused:
    return Refused(
        number, type(error).__name__, error.message, error.code, error.param, error.retry_after
    )
