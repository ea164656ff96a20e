"""Decides, in integers, which sequences advance by how many tokens, and keeps their books.

    scheduler = Scheduler(pool, max_num_seqs=..., max_num_batched_tokens=..., max_model_len=...)
    scheduler.add(submit, client)            raises InvalidRequest or a subclass, Overloaded
    scheduler.estimate(submits, seconds)     what they would take, or raises the same
    scheduler.cancel(id, choice, client)     from any state, idempotent; nothing is sent for it
    scheduler.cancel_client(client)          a connection is lost
    scheduler.expire() -> Deliveries         partial answers of what is out of time
    scheduler.schedule() -> Step | None      None: nobody is here, or all must wait
    scheduler.update(step, result) -> Deliveries
    scheduler.abandon(error, ...) -> Deliveries      instead: what is under way came to nothing
    scheduler.has_work, .gauges(), .counters

One step may be scheduled ahead of the update of the one before it (``service.engine.ahead``).

``Deliveries`` maps each client (connection) to its messages.Output of this step. Every choice gets
exactly one Output with a finish_reason, unless it was cancelled.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Hashable
from collections.abc import Sequence as Collection
from typing import TYPE_CHECKING, Literal

from service.engine.adapters import AdapterTable
from service.engine.admission import QueueBounds, RequestLimits, Room
from service.engine.ahead import feed, may_run_ahead
from service.engine.blocks import BlockPool
from service.engine.costs import StepCosts
from service.engine.counters import Counters, Gauges
from service.engine.drain_rate import DrainRate
from service.engine.estimate import Forecast
from service.engine.expiry import Expiries
from service.engine.fair_queue import FairQueue
from service.engine.fair_share import FairShare
from service.engine.lineup import Lineup
from service.engine.messages import DEADLINE, REFUSED, Output, Submit
from service.engine.paging import Paging
from service.engine.sequence import (
    NO_TOKEN,
    NOTHING_PROPOSED,
    Ending,
    Request,
    Sequence,
    Status,
    Tally,
)
from service.engine.speculation import SpeculationLimits, Speculator
from service.engine.step import Draw, Row, RowResult, Step, StepResult
from service.engine.waiting import FirstComeQueue, WaitingQueue
from service.errors import InvalidRequest, PronkError

if TYPE_CHECKING:
    from model.grammar import Grammar

Deliveries = dict[Hashable, list[Output]]
NO_SPECULATION = SpeculationLimits()
Policy = Literal["fair", "fcfs"]
PATIENCE = 8  # full steps an account is owed before all others make room for it
ASKING = object()  # the client of requests that are only asked about


class Scheduler:
    def __init__(
        self,
        pool: BlockPool,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        max_queued_requests: int = 1024,
        max_queued_tokens: int = 1_000_000,
        clock: Callable[[], float] = time.monotonic,
        policy: Policy = "fair",
        speculation: SpeculationLimits = NO_SPECULATION,
        costs: tuple[StepCosts, StepCosts] | None = None,
        adapters: AdapterTable | None = None,
    ) -> None:
        """``costs`` of steps and of the draft model's passes, where they were measured."""
        assert max_num_seqs >= 1, "nobody could run"
        assert max_num_batched_tokens >= 1, "nothing could be computed"
        self.pool = pool
        self.max_model_len = max_model_len
        self.counters = Counters()
        self.rate = DrainRate()
        self._clock = clock
        self._paging = Paging(pool)
        self._shares = FairShare(PATIENCE * max_num_batched_tokens)
        fair = FairQueue(self._shares) if policy == "fair" else None
        self._waiting: WaitingQueue = FirstComeQueue() if fair is None else fair
        self.adapters = AdapterTable() if adapters is None else adapters
        self._speculator = Speculator(speculation, self.counters, *(costs or ()))
        self._lineup = Lineup(
            self._paging,
            self._waiting,
            max_num_seqs,
            max_num_batched_tokens,
            self.counters,
            clock,
            self._speculator,
            max_model_len,
            self.adapters,
            fair,
        )
        self._limits = RequestLimits(max_model_len, pool.num_usable, pool.block_size)
        self._bounds = QueueBounds(max_queued_requests, max_queued_tokens)
        self._expiries = Expiries()
        self._requests: dict[tuple[Hashable, int], Request] = {}
        self._numbers = itertools.count()
        self._num_steps = 0
        self._num_ended = 0  # choices, since the rate last heard of it
        self._under_way: deque[Step] = deque()  # launched and not yet updated: two at most
        self._last_update = 0.0

    @property
    def has_work(self) -> bool:
        return bool(self._requests)

    def gauges(self) -> Gauges:
        waiting = self._waiting
        return Gauges(len(self._lineup.running), len(waiting), waiting.tokens, self.pool.num_free)

    def room(self) -> Room:
        accounts, free_slots = self._shares.active.values(), max(self._lineup.free_slots, 0)
        return self._bounds.room(self._waiting, accounts, free_slots, self.rate.seconds_for)

    def adapters_in_use(self) -> tuple[list[str], list[str]]:
        """Names of those that run, and of those waited for."""
        running = {sequence.adapter for sequence in self._lineup.running if sequence.adapter}
        name = self.adapters.name
        return sorted(map(name, running)), sorted(map(name, self._waiting.adapters()))

    # ---- requests come and go ------------------------------------------------------------------

    def add(self, submit: Submit, client: Hashable = 0, grammar: Grammar | None = None) -> None:
        """Takes a request into the queue, or raises what its client is to be told."""
        self.check(submit, client)
        account = self._shares.join(submit.account, submit.weight)
        request = Request(submit, client, next(self._numbers), self._clock(), grammar, account)
        sequence = Sequence.start(request, self.pool.grain)
        request.sequences = {choice.index: sequence for choice in sequence.choices}
        self._requests[request.key] = request
        self.adapters.hold(submit.adapter_version)
        self._waiting.add(sequence)
        self._expiries.add(request)

    def check(self, submit: Submit, client: Hashable = 0) -> None:
        """Raises what ``add`` would."""
        try:
            self._check(submit, client)
        except PronkError as error:
            self.counters.rejected[error.code or "invalid_request"] += 1
            raise

    def _check(self, submit: Submit, client: Hashable) -> None:
        if (client, submit.id) in self._requests:
            raise InvalidRequest(f"Request {submit.id} is still being answered.")
        self.adapters.check(submit)
        self._limits.check(submit)
        if not submit.is_owed:
            free_slots = max(self._lineup.free_slots, 0)
            self._bounds.check(submit, self._waiting, free_slots, self.rate.seconds_for)

    def estimate(
        self, submits: Collection[Submit], seconds: Callable[[int], float]
    ) -> dict[str, float]:
        """What these would take if they came now, all together; nothing is changed.

        ``seconds`` of a step by its tokens. Raises what ``add`` would, and counts it nowhere.
        """
        for submit in submits:
            self._check(submit, ASKING)
        forecast = self._forecast(sum(len(submit.settings) for submit in submits), seconds)
        fresh = [Sequence.start(self._asked(submit), self.pool.grain) for submit in submits]
        forecast.wait_in_line(self._waiting.before(fresh[0]))
        cached = [self._paging.cached_tokens(sequence) for sequence in fresh]
        pages = self.pool.pages_for(len(fresh[0].tokens) - cached[0])
        passages = [
            forecast.take_in(
                len(sequence.tokens) - known,
                [choice.settings.max_tokens for choice in sequence.choices],
                has_room=pages <= self.pool.num_free,
            )
            for sequence, known in zip(fresh, cached, strict=True)
        ]
        end = max(passage.end for passage in passages)
        start, first = passages[0].start, max(passage.first for passage in passages)
        return {
            "cached_tokens": sum(cached),
            "queue_seconds": start,
            "prefill_seconds": first - start,
            "decode_seconds": end - first,
            "total_seconds": end,
        }

    def _asked(self, submit: Submit) -> Request:
        account = self._shares.preview(submit.account, submit.weight)
        return Request(submit, ASKING, next(self._numbers), 0.0, account=account)

    def _forecast(self, num_new: int, seconds: Callable[[int], float]) -> Forecast:
        lineup, costs, counters = self._lineup, self._speculator.costs, self.counters
        num_ended = counters.finished["stop"] + counters.finished["length"]
        return Forecast(
            lineup.running,
            lineup.max_num_seqs,
            lineup.budget,
            counters.generation_tokens / num_ended if num_ended else math.inf,
            seconds,
            costs.seconds if costs.is_known else seconds,
            num_new,
        )

    def cancel(self, id: int, choice: int | None = None, client: Hashable = 0) -> bool:
        """Drops a request, or one choice of it; False if that was gone already."""
        request = self._requests.get((client, id))
        if request is None:
            return False
        choices = [i for i in request.sequences if choice is None or i == choice]
        for i in choices:
            self._end(request.sequences[i], i, "cancelled")
        return bool(choices)

    def cancel_client(self, client: Hashable) -> int:
        """Drops everything of a lost connection; the number of requests it had."""
        ids = [id for owner, id in self._requests if owner == client]
        for id in ids:
            self.cancel(id, client=client)
        return len(ids)

    def expire(self, now: float | None = None) -> Deliveries:
        """Ends what is past its deadline, or waited too long: a partial answer, not an error."""
        now = self._clock() if now is None else now
        out: Deliveries = {}
        for request in self._expiries.due(now):
            for choice, sequence in list(request.sequences.items()):
                self._finish(sequence, choice, Ending("length", DEADLINE), now, out)
        return out

    # ---- a step --------------------------------------------------------------------------------

    def schedule(self) -> Step | None:
        """The next step. With one under way it is made ahead of what that one draws.

        None also where it has to wait for that one: nothing is preempted ahead of an update, for
        what is known only then might have made room.
        """
        assert len(self._under_way) < 2, "two steps are under way"
        before = self._under_way[-1] if self._under_way else None
        if not self._requests:
            self.rate.pause()
            return None
        if before is not None and not self._can_run_ahead(before):
            return None
        self.rate.start(self._clock())
        step = Step(self._num_steps)
        self._lineup.fill(step, is_ahead=before is not None)
        if before is not None:
            if not step.rows:
                return None
            feed(step, before)
        assert step.rows, "somebody is here and nobody can run"
        for row in step.rows:
            row.depart(self.max_model_len)
        self._num_steps += 1
        self._under_way.append(step)
        step.began = self._clock()
        return step

    def _can_run_ahead(self, before: Step) -> bool:
        return (
            self._lineup.trials.current() is None
            and all(map(may_run_ahead, before.rows))
            # Should it fail, what it was to bring into host memory or a slot is not there.
            and not (before.stores or before.fills)
            and not self._speculator.may_guess_after(before)
            and self._lineup.can_spare_pages
            and not self._lineup.leaving()
        )

    def update(self, step: Step, result: StepResult) -> Deliveries:
        """Extends, forks, finishes and frees; what each client is to be told."""
        assert self._under_way, "no step is under way"
        assert step is self._under_way[0], "not the step launched first"
        self._under_way.popleft()
        now = self._clock()
        seconds = now - max(step.began, self._last_update)
        self._speculator.observe(step, seconds, result.draft_passes)
        self._last_update = now
        out: Deliveries = {}
        if not result.has_run:
            self._forget_moves(step)
        for row, came in zip(step.rows, result.rows, strict=True):
            row.arrive()
            self._update_row(row, came, now, out)
        self.rate.observe(now, self._num_ended, step.num_tokens)
        self._num_ended = 0
        return out

    def abandon(self, error: str, *, lacks_memory: bool = False) -> Deliveries:
        """The steps under way raised, and what they did to pages is not known.

        Their sequences start over. Where memory ran out steps become smaller, else each sequence is
        tried alone. One that failed alone already ends with ``error``.
        """
        assert self._under_way, "no step is under way"
        now, out = self._clock(), Deliveries()
        steps = list(self._under_way)
        self._under_way.clear()
        for step in steps:
            self._forget_moves(step)
            for row in step.rows:
                row.arrive()
        sequences = list(dict.fromkeys(row.sequence for step in steps for row in step.rows))
        living = [one for one in sequences if one.status is not Status.FINISHED]
        for sequence in sequences:
            if sequence.status is Status.FINISHED:
                self._lineup.release_unused(sequence)
        for sequence in living:
            # What went wrong may lie in its pages: the next to ask must not find it there.
            self.pool.distrust(sequence.block_table, sequence.chain.digests)
        can_retry = len(living) > 1
        if lacks_memory and living:
            can_retry = self._lineup.narrow(len(living), max(step.num_tokens for step in steps))
        for sequence in living:
            if not can_retry:
                self._fail(sequence, error, now, out)
            elif sequence.status is Status.RUNNING:
                self._lineup.put_back(sequence)
            sequence.request.forget_pooled()
        if can_retry and not lacks_memory:
            self._lineup.trials.add(living)
        self._last_update = now
        return out

    def _forget_moves(self, step: Step) -> None:
        self.pool.host.forget_slots(slot for _, slot, _ in step.stores)
        self.adapters.forget_fills(step.fills)

    def _fail(self, sequence: Sequence, error: str, now: float, out: Deliveries) -> None:
        for choice in sequence.choices:
            self._finish(sequence, choice.index, Ending("error", None, error), now, out)

    def _update_row(self, row: Row, came: RowResult, now: float, out: Deliveries) -> None:
        sequence = row.sequence
        if row.gives_up:
            self._speculator.give_up(sequence)
        if sequence.status is Status.FINISHED:
            self.counters.discarded_tokens += len(came.draws)
            self._lineup.release_unused(sequence)
        elif row.is_void:
            self.counters.discarded_tokens += len(came.draws)
        elif row.proposed and not came.draws and came.error is None:
            return  # computed in vain: the sequence is where it was
        elif came.error is not None:
            if not came.is_refusal:
                # What went wrong may lie in its pages: the next to ask must not find it there.
                self.pool.distrust(sequence.block_table, sequence.chain.digests)
            for choice in sequence.choices:
                ending = Ending("error", REFUSED if came.is_refusal else None, came.error)
                self._finish(sequence, choice.index, ending, now, out)
        else:
            sequence.num_computed += row.count
            self._paging.register(sequence)
            if row.num_targets:
                sequence.request.keep_prompt_logprobs(came.prompt_logprobs, row.num_targets)
            if row.num_pooled:
                sequence.request.keep_pooled(row.num_pooled, came.pooled)
            if sequence.num_computed == len(sequence.tokens):
                self._note_prompt_done(sequence.request)
                self._draw(row, came.draws, now, out)
            if came.is_late:
                self._void_next(sequence)

    def _void_next(self, sequence: Sequence) -> None:
        """The row launched ahead was fed another token than the one drawn: it is made again."""
        for row in self._under_way[0].rows if self._under_way else ():
            if row.sequence is sequence and sequence.status is not Status.FINISHED:
                row.void()

    def _note_prompt_done(self, request: Request) -> None:
        if not request.is_prompt_done:
            request.is_prompt_done = True
            self.counters.prompt_tokens += len(request.submit.prompt)

    def _draw(self, row: Row, draws: list[Draw], now: float, out: Deliveries) -> None:
        """Gives each choice its token; the prompt's row has drawn for all, who now part."""
        sequence = row.sequence
        if len(row.choices) == 1 and row.choices is sequence.choices:
            self._extend(sequence, draws, now, out, len(row.proposed))
            if row.proposed:
                self._speculator.note(row, len(draws) - 1)
            return
        drawn = {choice.index: [draw] for choice, draw in zip(row.choices, draws, strict=True)}
        children = sequence.fork()
        self._lineup.run_forks(children)  # before anyone's end: they share living pages
        for member in (sequence, *children):
            sequence.request.sequences[member.choice] = member
            self._extend(member, drawn.pop(member.choice, []), now, out)
        self.counters.discarded_tokens += len(drawn)

    def _extend(
        self,
        sequence: Sequence,
        draws: list[Draw],
        now: float,
        out: Deliveries,
        num_proposed: int = 0,
    ) -> None:
        """Gives it its next tokens: all but the last had been proposed, and are computed."""
        if not draws:  # max_tokens is 0: the prompt was all
            self._finish(sequence, sequence.choice, Ending("length"), now, out)
            return
        if draws[0].token == NO_TOKEN:
            self._finish(sequence, sequence.choice, Ending("stop"), now, out)
            return
        ending = self._append(sequence, draws[0])
        told = draws[:1]
        while ending is None and len(told) < len(draws):
            sequence.num_computed += 1
            ending = self._append(sequence, draws[len(told)])
            told = draws[: len(told) + 1]
        if len(told) > 1:
            self._paging.register(sequence)
        self.counters.discarded_tokens += len(draws) - len(told)
        accepted = min(len(told), len(draws) - 1)
        tally = Tally(accepted, num_proposed - accepted)
        if ending is None:
            output = sequence.request.output(sequence.choice, now, told, tally=tally)
            out.setdefault(sequence.request.client, []).append(output)
        else:
            self._finish(sequence, sequence.choice, ending, now, out, told, tally)

    def _append(self, sequence: Sequence, draw: Draw) -> Ending | None:
        sequence.tokens.append(draw.token)
        self.counters.generation_tokens += 1
        ending = sequence.ending(self.max_model_len)
        if draw.completes and (ending is None or ending.finish_reason == "length"):
            return Ending("stop")
        return ending

    def _finish(
        self,
        sequence: Sequence,
        choice: int,
        ending: Ending,
        now: float,
        out: Deliveries,
        draws: Collection[Draw] = (),
        tally: Tally = NOTHING_PROPOSED,
    ) -> None:
        output = sequence.request.output(choice, now, draws, ending, tally)
        out.setdefault(sequence.request.client, []).append(output)
        self._end(sequence, choice, ending.finish_reason)

    def _end(self, sequence: Sequence, choice: int, reason: str) -> None:
        """Takes one choice off the books; a sequence without any leaves and frees its blocks."""
        request = sequence.request
        del request.sequences[choice]
        self.counters.finished[reason] += 1
        self._num_ended += 1
        if len(sequence.choices) == 1:
            self._lineup.remove(sequence)
        else:
            sequence.drop(choice)
            if sequence.status is Status.WAITING:
                self._waiting.recount(sequence, 1)
        if not request.sequences:
            del self._requests[request.key]
            self.adapters.release(request.submit.adapter_version)
            self._shares.leave(request.account)
