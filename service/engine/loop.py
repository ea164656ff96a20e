"""The engine's loop: take commands, run a step, tell what came of it. Blocks when idle.

Running ahead, a step is launched before the one before it is collected: while the device computes
one, the host tells of the last and prepares the next, and the device never waits for it.
"""

from __future__ import annotations

import logging
import time
import traceback
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from model.grammar import Grammar
from service.engine.adapter_desk import AdapterDesk
from service.engine.connections import Connections, Event, Lost
from service.engine.flight_recorder import FlightRecorder
from service.engine.grammar_desk import GrammarDesk
from service.engine.messages import (
    Accepted,
    Cancel,
    Cancelled,
    Control,
    Outputs,
    Refused,
    Reply,
    State,
    Submit,
)
from service.engine.options import BEYOND_USE, OUT_OF_MEMORY
from service.engine.pulse import Pulse
from service.engine.rates import StepRates
from service.engine.scheduler import Deliveries, Scheduler
from service.engine.step import Step, StepResult
from service.errors import InvalidRequest, PronkError, Unavailable
from service.redaction import Redacted

logger = logging.getLogger("pronk.engine")

IDLE_WAIT = 1.0  # seconds: the heartbeat's
READING_WAIT = 0.02  # while an adapter is read in another thread
COMPILING_WAIT = 0.002  # while a grammar is compiled in another one
ASKED_TO_STOP = 0  # exit code
LOGGED_IDS = 32  # requests named in a line about a step
MAX_FAILURES = 3  # steps in a row that raise; then a fresh process is the better hope
MAX_SHRINKINGS = 32  # the same of steps for which memory did not do
STEP_FAILED = "the engine failed on this request: send it again"
NO_MEMORY = "memory does not do for this request, not even alone: send a shorter one, or try later"
UNSEEN_STEP = 6.0  # seconds it may take, and a tenth of what is borne: kernels may be compiled


Launched = TypeVar("Launched")


class Runner(Protocol[Launched]):
    """What the loop needs of ``ModelRunner``."""

    def launch(self, step: Step, before: Launched | None) -> Launched: ...
    def collect(self, launched: Launched) -> StepResult: ...
    def is_fatal(self, error: Exception) -> bool: ...
    def lacks_memory(self, error: Exception) -> bool: ...
    def abandon(self, step: Step) -> None: ...
    def free_memory(self) -> None: ...


@dataclass(slots=True, repr=False)
class Flight(Redacted, Generic[Launched]):
    """A step under way, or why it could not be launched."""

    step: Step
    launched: Launched | None = None
    error: Exception | None = None


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
        grammars: GrammarDesk | None = None,
        *,
        runs_ahead: bool = False,
        recorder: FlightRecorder | None = None,
    ) -> None:
        self._connections = connections
        self._pulse = pulse
        self._scheduler = scheduler
        self._runner = runner
        self._rates = rates
        self._facts = facts
        self._runs_ahead = runs_ahead
        self._flight: Flight[Launched] | None = None
        self._adapters = adapters
        self._grammars = grammars
        self._early: list[Event] = []  # heard while a step was on the device
        self.num_steps = 0
        self._step_seconds = 0.0
        self._model_seconds = 0.0
        self._gap_seconds = 0.0
        self._busy_since: float | None = None  # the last step was back, and there is more to do
        self._recorder = recorder
        self._num_failures = 0  # in a row
        self._num_shrinkings = 0  # in a row
        self._num_failed_steps = 0
        self._is_draining = False
        self._exit_code: int | None = None

    def run(self) -> int:
        """Serve; returns the process's exit code."""
        self._publish(urgent=True)
        while self._exit_code is None:
            self._take_commands()
            self._tend_adapters()
            self._take_compiled()
            self._send(self._scheduler.expire())
            self._advance()
            self._publish()
        return self._exit_code

    # ---- commands

    def _take_commands(self) -> None:
        """Whatever has come in; waits for it only when there is nothing to compute."""
        early, self._early = self._early, []
        is_busy = bool(early) or self._flight is not None or self._scheduler.has_work
        if not is_busy:
            self._busy_since = None
        for front_end, message in [*early, *self._connections.poll(0.0 if is_busy else self._wait)]:
            match message:
                case Submit():
                    self._note_at_hand(self._flight, newcomer=message)
                    self._submit(front_end, message)
                case Cancel():
                    self._scheduler.cancel(message.id, message.choice, front_end)
                    if self._grammars is not None:
                        self._grammars.cancel(front_end, message.id)
                    self._connections.send(front_end, Cancelled(message.id))
                case Lost():
                    self._scheduler.cancel_client(front_end)
                    if self._grammars is not None:
                        self._grammars.cancel(front_end)
                case Control():
                    self._control(front_end, message)

    @property
    def _wait(self) -> float:
        """Seconds to wait for a command where nobody is here to be computed for."""
        if self._grammars is not None and self._grammars.is_busy:
            return COMPILING_WAIT
        is_reading = self._adapters is not None and self._adapters.is_reading
        return READING_WAIT if is_reading else IDLE_WAIT

    def _submit(self, front_end: int, submit: Submit) -> None:
        """Exactly one answer, before any output; with a new grammar once that is compiled."""
        grammar = None
        try:
            if self._is_draining and not (submit.is_continuation or submit.is_owed):
                raise Unavailable("the server is shutting down", code="draining", retry_after=1.0)
            if submit.grammar and self._grammars is not None:
                self._scheduler.check(submit, front_end)
                grammar = self._grammars.get(front_end, submit)
                if grammar is None:
                    return
        except PronkError as error:
            self._connections.send(front_end, as_refused(submit.id, error))
        else:
            self._enter(front_end, submit, grammar)

    def _enter(self, front_end: int, submit: Submit, grammar: Grammar | None) -> None:
        try:
            self._scheduler.add(submit, front_end, grammar)
        except PronkError as error:
            self._connections.send(front_end, as_refused(submit.id, error))
        else:
            self._connections.send(front_end, Accepted(submit.id))

    def _take_compiled(self) -> None:
        if self._grammars is None:
            return
        for front_end, submit, grammar in self._grammars.finished():
            if isinstance(grammar, PronkError):
                self._connections.send(front_end, as_refused(submit.id, grammar))
            else:
                self._enter(front_end, submit, grammar)

    def _control(self, front_end: int, control: Control) -> None:
        match control.verb:
            case "drain":
                self._is_draining = True
            case "shutdown":
                self._exit_code = ASKED_TO_STOP
            case "load_adapter" | "unload_adapter":
                return self._adapter_control(front_end, control)
            case "estimate":
                return self._estimate(front_end, control)
            case "ping":
                self._publish(urgent=True)  # before the reply: who hears it knows all that was done
        self._connections.send(front_end, Reply(control.id))
        return None

    def _estimate(self, front_end: int, control: Control) -> None:
        """The answer to a question that costs no step; a refusal is what a submit would get."""
        try:
            result = self._scheduler.estimate(control.submits, self._rates.estimate)
        except PronkError as error:
            self._connections.send(front_end, as_refused(control.id, error))
        else:
            self._connections.send(front_end, Reply(control.id, dict(result)))

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

    def _advance(self) -> None:
        """Launch the next step, and collect what was under way; or it, when not running ahead."""
        if self._busy_since is None and self._scheduler.has_work:
            self._busy_since = time.monotonic()
        step, before = self._scheduler.schedule(), self._flight
        self._note_at_hand(before, step)
        self._flight = None if step is None else self._launch(step, before)
        if before is not None and not self._land(before):
            return
        if self._flight is not None and (not self._runs_ahead or self._flight.error is not None):
            flight, self._flight = self._flight, None
            if not self._land(flight):
                return
        self._note_at_hand(self._flight)

    def _note_at_hand(
        self,
        flight: Flight[Launched] | None,
        step: Step | None = None,
        newcomer: Submit | None = None,
    ) -> None:
        """Should this process end now, these are whom it was busy with."""
        if self._recorder is None:
            return
        steps = [flight.step] if flight is not None else []
        rows = [row for one in (*steps, *([step] if step else [])) for row in one.rows]
        numbers = {row.sequence.id for row in rows}
        if newcomer is not None:
            numbers.add(newcomer.id)
        self._recorder.write(numbers)

    def _launch(self, step: Step, before: Flight[Launched] | None) -> Flight[Launched]:
        if before is None:
            self._pulse.step_begins(self._allowance(step))
        try:
            launched = self._runner.launch(step, before.launched if before is not None else None)
        except Exception as error:
            return Flight(step, error=error)
        return Flight(step, launched)

    def _allowance(self, step: Step) -> float:
        """Seconds it should take; a size that was never seen may have kernels compiled first."""
        estimate = self._rates.estimate(step.num_tokens)
        return estimate if self._rates.has_seen(step.num_tokens) else max(estimate, UNSEEN_STEP)

    def _land(self, flight: Flight[Launched]) -> bool:
        """Wait for a step; its end is when the next one under way has the device to itself.

        False where it raised: then nothing is under way any more.
        """
        step = flight.step
        try:
            if flight.launched is None:
                assert flight.error is not None
                raise flight.error
            self._early += self._connections.poll(0)  # while the device computes
            result = self._runner.collect(flight.launched)
        except Exception as error:
            self._failed(flight, error)
            return False
        self._num_failures = self._num_shrinkings = 0
        seconds = self._pulse.step_ends()
        if self._flight is not None:
            self._pulse.step_begins(self._allowance(self._flight.step))
        self._rates.observe(step.num_tokens, seconds)
        self.num_steps += 1
        self._count_gap(result.model_seconds)
        self._send(self._scheduler.update(step, result), step, seconds)
        return True

    def _count_gap(self, model_seconds: float) -> None:
        """From one step's end to the next one's; what of it was not the network's is the gap."""
        now = time.monotonic()
        assert self._busy_since is not None, "a step without work"
        self._step_seconds += now - self._busy_since
        self._model_seconds += model_seconds
        self._busy_since = now
        # A step may have been in the network before the last one was back: counters only rise.
        self._gap_seconds = max(self._gap_seconds, self._step_seconds - self._model_seconds)

    def _failed(self, flight: Flight[Launched], error: Exception) -> None:
        """Its sequences are tried alone, or in smaller steps; unless the engine cannot go on.

        Then nobody is told: the process that started this one answers for it, and tries again.
        """
        step, ahead = flight.step, self._flight
        about = {"request_ids": _request_ids(step)}
        logger.error(
            "step %d failed: %s", step.number, type(error).__name__, exc_info=error, extra=about
        )
        lacks_memory = self._runner.lacks_memory(error)
        self._num_failed_steps += 1
        self._num_shrinkings += lacks_memory
        self._num_failures += not lacks_memory
        if self._runner.is_fatal(error) or self._num_failures >= MAX_FAILURES:
            logger.error("the device is beyond use: leaving, to be started again")
            self._exit_code = BEYOND_USE
            return
        if self._num_shrinkings >= MAX_SHRINKINGS:
            logger.error("memory does not do for any step: leaving, to be started again")
            self._exit_code = OUT_OF_MEMORY
            return
        traceback.clear_frames(error.__traceback__)  # they hold tensors
        flight.error = flight.launched = None
        if ahead is not None:
            self._let_pass(ahead)
        self._flight = None
        self._pulse.step_ends()
        self._runner.abandon(step)
        if lacks_memory:
            self._runner.free_memory()
        self.num_steps += 1
        self._count_gap(0.0)
        told = NO_MEMORY if lacks_memory else STEP_FAILED
        self._send(self._scheduler.abandon(told, lacks_memory=lacks_memory), step)

    def _let_pass(self, ahead: Flight[Launched]) -> None:
        """It was fed by a step that raised: nothing of it counts, but it still writes to pages."""
        if ahead.launched is not None:
            try:
                self._runner.collect(ahead.launched)
            except Exception as error:
                logger.info("so did the step after it: %s", type(error).__name__)
        self._runner.abandon(ahead.step)
        ahead.error = ahead.launched = None

    # ---- answers

    def _send(self, deliveries: Deliveries, step: Step | None = None, seconds: float = 0.0) -> None:
        """One message to every front end that had a part in the step, outputs or not."""
        rows = step.rows if step is not None else []
        for front_end in {row.sequence.request.client for row in rows} | deliveries.keys():
            assert isinstance(front_end, int)
            message = Outputs(
                step=step.number if step is not None else self.num_steps,
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
        room = self._scheduler.room()
        state = State(
            stage="draining" if self._is_draining else "ready",
            progress=1.0,
            steps=self.num_steps,
            running=gauges.running,
            waiting=gauges.waiting,
            waiting_tokens=gauges.waiting_tokens,
            room=room.num_sequences,
            retry_after=room.retry_after,
            refused=dict(room.refused),
            is_shut=room.is_shut,
            num_blocks=self._scheduler.pool.num_usable,
            free_blocks=gauges.free_blocks,
            block_size=self._scheduler.pool.block_size,
            host_blocks=self._scheduler.pool.host.num_slots,
            used_host_blocks=self._scheduler.pool.host.num_used,
            max_model_len=self._scheduler.max_model_len,
            counters=self._scheduler.counters.as_dict() | self.counters(),
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

    def counters(self) -> dict[str, float]:
        return {
            "failed_steps": self._num_failed_steps,
            "step_seconds": self._step_seconds,
            "gap_seconds": self._gap_seconds,
        }


def as_refused(number: int, error: PronkError) -> Refused:
    return Refused(
        number, type(error).__name__, error.message, error.code, error.param, error.retry_after
    )


def _request_ids(step: Step) -> list[str]:
    """Whose step it was, for log lines: each once, the first ``LOGGED_IDS``."""
    ids = dict.fromkeys(row.sequence.request.submit.request_id for row in step.rows)
    return [one for one in ids if one][:LOGGED_IDS]
