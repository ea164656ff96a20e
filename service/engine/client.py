"""The engine as the HTTP process sees it: submit to it, hear from it, outlive it.

Everything runs on one event loop; nothing here imports torch. The process behind it is the
supervisor's; the client answers every waiting request whatever becomes of that process.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence

from msgspec.structs import replace

from service import errors
from service.engine.attempt import Attempt
from service.engine.generation import Generation
from service.engine.messages import (
    Accepted,
    Cancel,
    Cancelled,
    Control,
    FromEngine,
    Output,
    Outputs,
    Refused,
    Reply,
    SamplingSettings,
    State,
    Submit,
)
from service.engine.options import EngineOptions
from service.engine.process import WORKER
from service.engine.quarantine import Quarantine
from service.engine.refusals import as_error, unavailable
from service.engine.retries import Retries
from service.engine.supervisor import Patience, Supervisor
from service.engine.tally import Tally

logger = logging.getLogger("pronk.engine")

LOGGED_IDS = 32  # requests named in a line about all of them
Observer = Callable[[Outputs | State], None]
NEVER_READY = ("failed", "stopped")
BEFORE_READY = {"starting", "loading", "warming_up"}
MAX_RETRY_AFTER = 300.0  # seconds
DIED = "the engine failed while it answered: try again"
TRYING = "requests that ran when the engine failed are tried one at a time"


class EngineClient:
    """Proxy of one engine. ``start`` returns at once; ``wait_ready`` waits for the model.

    ``state.stage`` is the engine's (loading, warming_up, ready, draining, failed) or one of the
    client's own: starting, restarting, stalled, stopped.
    """

    def __init__(
        self, options: EngineOptions, *, patience: Patience | None = None, worker: str = WORKER
    ) -> None:
        self.observers: list[Observer] = []  # called with every Outputs and State, on the loop
        self.num_retried = 0  # requests sent to a second engine: the first one died over them
        self.num_discarded = 0  # tokens that reached this process and nobody read
        patience = patience or Patience()
        self._supervisor = Supervisor(options, patience, self, worker)
        self._quarantine = Quarantine()
        self._retries = Retries(self._quarantine, patience.retry, self._send)
        self._trial: asyncio.Task[None] | None = None  # of suspects, before the engine is ready
        self._state = State(stage="stopped")
        self._changed = asyncio.Event()  # replaced at each change of stage
        self._stage_since = time.monotonic()
        self._load_seconds = 10.0  # a guess until a load was timed
        self._next_id = 0
        self._attempts: dict[int, Attempt] = {}
        self._left: dict[int, Generation] = {}  # by their readers; the engine may not know it yet
        self._replies: dict[int, asyncio.Future[Reply]] = {}
        self._adapters = dict(options.adapters)  # name to folder: what a new engine is to load
        self._is_draining = False
        self._is_stopping = False
        self._idle = asyncio.Event()
        self._idle.set()

    # ---- state

    @property
    def state(self) -> State:
        return self._state

    @property
    def is_ready(self) -> bool:
        return self._state.stage == "ready"

    @property
    def num_restarts(self) -> int:
        return self._supervisor.num_restarts

    @property
    def restarts(self) -> Mapping[str, int]:
        """By why the engine before had ended: see ``supervisor.RESTART_REASONS``."""
        return self._supervisor.restarts

    @property
    def num_poisonous(self) -> int:
        """Refusals of what ended the engine twice."""
        return self._quarantine.num_refused

    @property
    def num_unfinished(self) -> int:
        return len(self._attempts)

    @property
    def pid(self) -> int | None:
        return self._supervisor.pid

    def heartbeat_age(self) -> float:
        """Seconds since anything was heard from the engine."""
        return self._supervisor.watchdog.silence()

    def retry_after(self) -> float:
        """Seconds after which a refused client may find the engine ready."""
        elapsed = time.monotonic() - self._stage_since
        remaining = self._load_seconds - elapsed
        if self._state.stage == "loading" and self._state.progress > 0.05:
            remaining = elapsed / self._state.progress - elapsed
        return max(1.0, min(MAX_RETRY_AFTER, remaining))

    async def wait_ready(self) -> None:
        """Return once requests are served. Raises ``EngineFailure`` when they never will be."""
        while not self.is_ready:
            if self._state.stage in NEVER_READY:
                reason = self._state.reason or f"the engine is {self._state.stage}"
                raise errors.EngineFailure(reason)
            await self._changed.wait()

    # ---- life

    def set_model(self, path: str, draft: str | None = None) -> None:
        """For models whose place is known only later (a download); before ``start``."""
        self._supervisor.set_model(path, draft)

    async def start(self) -> None:
        """Start the engine process and the task that watches over it."""
        self._supervisor.start()

    async def drain(self) -> None:
        """Refuse new work from now on; return when everything accepted has ended."""
        self._is_draining = True
        self._supervisor.send(Control(id=0, verb="drain"))
        self.announced(replace(self._state, stage="draining"))
        await self._idle.wait()

    async def stop(self) -> None:
        """End the engine process; every request still waiting fails."""
        self._is_draining = self._is_stopping = True
        await self._supervisor.stop()

    async def ping(self) -> Reply:
        """Ask the engine for a sign of life between two steps. Raises ``EngineFailure``."""
        return await self._control("ping")

    async def estimate(self, submits: list[Submit]) -> dict[str, object]:
        """What they would take if they came now, by ``Scheduler.estimate``. Raises the refusal."""
        self._refuse_unless_serving()
        return (await self._control("estimate", submits=submits)).result

    async def _control(
        self, verb: str, adapter: str = "", path: str = "", submits: Sequence[Submit] = ()
    ) -> Reply:
        if not self._supervisor.is_connected:
            raise errors.EngineFailure("no engine is connected")
        number = self._new_id()
        reply: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._replies[number] = reply
        try:
            self._supervisor.send(Control(number, verb, adapter, path, list(submits)))
            return await reply
        finally:
            self._replies.pop(number, None)

    # ---- adapters

    async def load_adapter(self, name: str, folder: str) -> None:
        """In place of one of that name. Raises the engine's refusal; ``state.adapters`` has it."""
        self._refuse_unless_serving()
        await self._control("load_adapter", name, folder)
        self._adapters[name] = folder
        self._supervisor.set_adapters(dict(self._adapters))

    async def unload_adapter(self, name: str) -> None:
        """New requests no longer find it, those that run go on. Raises ``NotFound``."""
        self._adapters.pop(name, None)
        self._supervisor.set_adapters(dict(self._adapters))
        self._refuse_unless_serving()
        await self._control("unload_adapter", name)

    # ---- requests

    @contextlib.asynccontextmanager
    async def submit(
        self,
        prompt: list[int],
        settings: Sequence[SamplingSettings],
        *,
        namespace: bytes = b"",
        account: str = "",
        weight: float = 1.0,
        priority: int = 0,
        deadline: float | None = None,
        max_queue: float | None = None,
        prompt_logprobs: int | None = None,
        request_id: str = "",
        adapter: str = "",
        adapter_version: int = 0,
        grammar: str = "",
        pooling: str = "",
        logprobs_from: int = 1,
        is_continuation: bool = False,
        is_retry: bool = False,
        tally: Tally | None = None,
    ) -> AsyncIterator[Generation]:
        """Enter once the engine accepted, or raise its refusal. Leaving cancels what still runs.

        ``tally`` counts all that comes of it, until the engine knows that it was left.
        """
        submit = Submit(
            id=self._new_id(),
            prompt=prompt,
            settings=list(settings),
            namespace=namespace,
            account=account,
            weight=weight,
            priority=priority,
            deadline=deadline,
            max_queue=max_queue,
            prompt_logprobs=prompt_logprobs,
            request_id=request_id,
            adapter=adapter,
            adapter_version=adapter_version,
            grammar=grammar,
            pooling=pooling,
            logprobs_from=logprobs_from,
            is_continuation=is_continuation or is_retry,
        )
        attempt = await self._admit(submit, tally or Tally(), num_tries=int(is_retry))
        try:
            yield attempt.generation
        finally:
            self._leave(attempt)

    async def _admit(self, submit: Submit, tally: Tally, num_tries: int) -> Attempt:
        """Register, send, wait for the answer; a refusal or a hang-up leaves nothing behind."""
        if not submit.is_continuation:
            self._refuse_unless_serving()
        attempt = self._register(submit, tally)
        attempt.num_tries = attempt.num_sent = num_tries
        try:
            await self._enter(attempt)
            await attempt.admission
        except BaseException:
            self._leave(attempt)
            raise
        return attempt

    async def _enter(self, attempt: Attempt) -> None:
        """To the engine; what goes on with an answer that has begun waits for one to be there."""
        submit = attempt.submit
        if (record := self._quarantine.find(submit)) is not None:
            self._quarantine.refuse_convicted(submit)
            await self._retries.wait_turn(attempt, record.progress)
        if not submit.is_continuation:
            self._refuse_unless_serving()
        elif not self._can_go_on:
            if self._is_stopping or self._state.stage in NEVER_READY:
                raise errors.EngineFailure(DIED)
            return self._retries.park(attempt)
        return self._send(attempt)

    @property
    def _can_go_on(self) -> bool:
        return self._state.stage in ("ready", "draining") and self._supervisor.is_connected

    def _send(self, attempt: Attempt) -> None:
        submit = attempt.due(self._supervisor.watchdog.state.adapters)
        self.num_retried += attempt.num_sent > 0
        attempt.num_sent += 1
        attempt.num_tries += 1
        attempt.is_in_engine = True
        self._supervisor.send(submit)

    def _refuse_unless_serving(self) -> None:
        if self.is_ready and self._supervisor.is_connected and not self._is_draining:
            return
        stage = "draining" if self._is_draining else self._state.stage
        raise unavailable(stage, self.retry_after())

    def _register(self, submit: Submit, tally: Tally) -> Attempt:
        def cancel(choice: int) -> None:
            self._cancel(generation, choice)

        generation = Generation(submit.id, len(submit.settings), cancel, tally)
        tally.begin()
        admission: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        attempt = self._attempts[submit.id] = Attempt(submit, generation, admission)
        self._idle.clear()
        return attempt

    def _leave(self, attempt: Attempt) -> None:
        """The one door of cancellation: hang-ups, deadlines, stop strings and ends all pass it."""
        generation = attempt.generation
        if attempt.is_in_engine and not generation.is_finished:
            self._cancel(generation)
        elif attempt.is_in_engine and generation.has_given:
            self._quarantine.acquit(attempt.submit)
        attempt.is_in_engine = False
        self._retries.drop(attempt)
        generation.close()
        attempt.passed.set()
        self.num_discarded += generation.num_discarded
        self._attempts.pop(attempt.number, None)
        if generation.num_cancels:
            self._left[generation.number] = generation
        else:
            generation.tally.end()
        if not self._attempts:
            self._idle.set()

    def _cancel(self, generation: Generation, choice: int | None = None) -> None:
        """Outputs on their way still come: the engine's answer is the last of them."""
        if self._supervisor.is_connected and not generation.has_failed:
            generation.num_cancels += 1
            self._supervisor.send(Cancel(generation.number, choice))

    def _note_cancelled(self, number: int) -> None:
        attempt = self._attempts.get(number)
        generation = self._left.get(number) if attempt is None else attempt.generation
        if generation is None:
            return
        generation.num_cancels -= 1
        if not generation.num_cancels and self._left.pop(number, None) is not None:
            generation.tally.end()

    def _new_id(self) -> int:
        self._next_id += 1
        return self._next_id

    # ---- what the supervisor tells

    def received(self, message: FromEngine) -> None:
        match message:
            case Outputs():
                self._deliver(message)
            case State():
                self.announced(message)
            case Accepted():
                self._settle(message.id, None)
            case Refused():
                self._settle(message.id, as_error(message))
            case Cancelled():
                self._note_cancelled(message.id)
            case Reply():
                reply = self._replies.get(message.id)
                if reply is not None and not reply.done():
                    reply.set_result(message)

    def announced(self, state: State) -> None:
        if state.stage == "ready":
            state = self._resumed(state)
        elif state.stage in NEVER_READY:
            self._retries.fail_all(errors.EngineFailure(DIED))
        if self._is_draining and state.stage == "ready":
            state = replace(state, stage="draining")
        earlier, self._state = self._state, state
        if state.stage != earlier.stage:
            self._note_change(earlier.stage, state.stage)
        self._tell(state)

    def lost(self, reason: str, at_hand: Collection[int] = ()) -> None:
        """Nobody waits for a dead engine: who has seen nothing yet waits for the next one."""
        if self._trial is not None:
            self._trial.cancel()
            self._trial = None
        for reply in self._replies.values():
            if not reply.done():
                reply.set_exception(errors.EngineFailure(reason))
        left, self._left = self._left, {}
        for generation in left.values():
            generation.tally.end()
        for attempt in self._attempts.values():
            attempt.generation.num_cancels = 0  # nobody is left to answer them
        orphans = [attempt for attempt in self._attempts.values() if attempt.is_in_engine]
        orphans = [attempt for attempt in orphans if not attempt.generation.is_finished]
        suspects = [attempt for attempt in orphans if attempt.number in at_hand]
        if suspects and not self._is_stopping:
            about = {
                "request_ids": [attempt.submit.request_id for attempt in suspects][:LOGGED_IDS]
            }
            logger.warning("the engine had %d requests at hand", len(suspects), extra=about)
        are_suspects = not self._is_stopping and self._quarantine.note_death(
            (attempt.submit, attempt.generation.num_tokens) for attempt in suspects
        )
        for attempt in orphans:
            attempt.num_tries -= attempt.number not in at_hand  # it only waited
            self._bereave(attempt, is_suspect=are_suspects and attempt in suspects)

    def _bereave(self, attempt: Attempt, *, is_suspect: bool) -> None:
        attempt.is_in_engine = False
        try:
            self._quarantine.refuse_convicted(attempt.submit)
            if self._is_stopping or attempt.is_tried_out:
                raise errors.EngineFailure(DIED)
            if attempt.generation.has_given:
                raise errors.EngineLost(DIED)
        except errors.PronkError as error:
            attempt.fail(error)
        else:
            attempt.generation.restart()
            self._retries.park(attempt, is_suspect=is_suspect)

    def _resumed(self, state: State) -> State:
        """An engine is there: what waits for it goes first, and newcomers once suspects passed."""
        if self._trial is None and self._retries.has_suspects:
            self._trial = asyncio.create_task(self._try_suspects(), name="trial of suspects")
        if self._trial is not None:
            return replace(state, stage="restarting", reason=TRYING)
        self._retries.send_rest()
        return state

    async def _try_suspects(self) -> None:
        try:
            await self._retries.try_suspects()
        except Exception:  # a bug in there must not leave everybody without an engine
            logger.exception("suspects could not be tried")
        self._trial = None
        self._retries.send_rest()
        self.announced(self._supervisor.watchdog.state)

    def _settle(self, number: int, error: errors.PronkError | None) -> None:
        """Answer the submit that waits; one that hung up has left no future behind."""
        attempt = self._attempts.get(number)
        reply = self._replies.get(number)
        if error is not None and reply is not None and not reply.done():
            reply.set_exception(error)
        if attempt is None:
            return
        if error is None:
            attempt.admit()
        else:
            attempt.fail(error)

    def _deliver(self, outputs: Outputs) -> None:
        self._tell(outputs)  # before the generations, whose merging makes the lists grow
        for output in outputs.outputs:
            attempt = self._attempts.get(output.id)
            if attempt is not None:
                attempt.generation.push(output)
                attempt.note_progress()
            else:
                self._note_late(output)

    def _note_late(self, output: Output) -> None:
        """Sent before the engine knew that nobody reads it."""
        self.num_discarded += len(output.tokens)
        if (left := self._left.get(output.id)) is not None:
            left.tally.note(output)

    def _tell(self, message: Outputs | State) -> None:
        for observer in self.observers:
            try:
                observer(message)
            except Exception:  # a metric that fails must not cost the engine its connection
                logger.exception("an observer of the engine failed")

    def _note_change(self, earlier: str, stage: str) -> None:
        now = time.monotonic()
        if stage == "ready" and earlier in BEFORE_READY:
            self._load_seconds = now - self._stage_since
        if not {earlier, stage} <= BEFORE_READY:
            self._stage_since = now
        self._changed.set()
        self._changed = asyncio.Event()
