"""One scheduler, its clients and a runner that remembers pages: whatever happens is checked.

Every method leaves the books right (``check``), and ``end`` lets everybody have their answer.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from service.engine.adapters import AdapterTable
from service.engine.blocks import BlockPool
from service.engine.messages import Output, Submit
from service.engine.scheduler import NO_SPECULATION, Deliveries, Policy, Scheduler
from service.engine.sequence import Status
from service.engine.speculation import SpeculationLimits
from service.engine.step import RowResult, Step, StepResult
from service.errors import InvalidRequest, Overloaded
from tests.engine.recording_runner import (
    RecordingRunner,
    expected_pooled,
    expected_prompt_logprobs,
    expected_text,
)

MAX_MODEL_LEN = 80
STEPS_AT_MOST = 20_000


@dataclass
class Answer:
    submit: Submit
    tokens: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    endings: dict[int, Output] = field(default_factory=dict)
    outputs: list[Output] = field(default_factory=list)
    cancelled: set[int] = field(default_factory=set)

    def take(self, output: Output) -> None:
        assert output.choice not in self.cancelled, "an answer to who has left"
        assert output.choice not in self.endings, "it had ended"
        is_first = not self.outputs
        assert (output.queue_time is not None) == is_first
        assert (output.cached_tokens is not None) == is_first
        assert 0 <= output.num_accepted <= len(output.tokens)
        assert output.num_rejected >= 0
        self.outputs.append(output)
        self.tokens[output.choice] += output.tokens
        wants_logprobs = self.submit.settings[output.choice].logprobs is not None
        assert len(output.logprobs or []) == (len(output.tokens) if wants_logprobs else 0)
        if output.finish_reason is not None:
            self.endings[output.choice] = output

    def check(self, max_model_len: int) -> None:
        """At the end: one ending a choice, and the text that it would have had alone."""
        choices = set(range(len(self.submit.settings)))
        assert self.endings.keys() | self.cancelled == choices
        assert not self.endings.keys() & self.cancelled
        for choice in choices:
            expected = expected_text(self.submit, choice, max_model_len)
            said = self.tokens[choice]
            assert said == expected[: len(said)]
            if choice in self.endings and not self._is_cut_short(choice):
                assert said == expected
                self._check_ending(choice, said)
        wanted = self.submit.prompt_logprobs is not None
        if wanted and self.outputs and not self._is_cut_short(self.outputs[0].choice):
            assert self.outputs[0].prompt_logprobs == expected_prompt_logprobs(self.submit)
        if self.submit.pooling and self.outputs and not self._is_cut_short(0):
            assert self.outputs[0].pooled == expected_pooled(self.submit)

    def _is_cut_short(self, choice: int) -> bool:
        ending = self.endings.get(choice)
        return ending is not None and (
            ending.finish_reason == "error" or ending.stop_reason == "deadline"
        )

    def _check_ending(self, choice: int, said: list[int]) -> None:
        settings, ending = self.submit.settings[choice], self.endings[choice]
        if ending.finish_reason == "length":
            assert ending.stop_reason is None
            return
        assert ending.finish_reason == "stop"
        assert len(said) > settings.min_tokens
        is_end = said[-1] in settings.eos_token_ids
        assert ending.stop_reason == (None if is_end else said[-1])


class Storm:
    """With ``ahead`` every step is launched before the one before it is collected."""

    def __init__(
        self,
        pool: BlockPool,
        max_num_seqs: int = 4,
        budget: int = 16,
        max_queued_requests: int = 12,
        max_queued_tokens: int = 300,
        speculation: SpeculationLimits = NO_SPECULATION,
        ahead: bool = False,
        is_late: Callable[[], bool] = lambda: False,
        adapters: AdapterTable | None = None,
        policy: Policy = "fair",
    ) -> None:
        self.now = 0.0
        self.pool = pool
        self.budget = budget
        self.max_num_seqs = max_num_seqs
        self.speculation = speculation
        self.scheduler = Scheduler(
            self.pool,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            max_model_len=MAX_MODEL_LEN,
            max_queued_requests=max_queued_requests,
            max_queued_tokens=max_queued_tokens,
            clock=lambda: self.now,
            speculation=speculation,
            adapters=adapters,
            policy=policy,
        )
        self.runner = RecordingRunner(self.pool, is_late)
        self.answers: dict[tuple[int, int], Answer] = {}
        self.flights: deque[tuple[Step, StepResult]] = deque()  # the eldest first
        self.depth = 2 if ahead else 1
        self.raises = False
        self.num_copies = self.num_stores = self.num_loads = 0
        self._is_broken = False  # a step could not be launched: all land before the next is made
        self._waits = False  # for the step under way, or nobody is here
        self.num_abandoned = 0
        self.num_ahead = 0  # steps launched while another was under way

    # ---- what clients do

    def submit(self, submit: Submit, client: int = 0) -> bool:
        before = self.scheduler.gauges()
        try:
            self.scheduler.add(submit, client)
        except InvalidRequest:
            refused = True
        except Overloaded as error:
            refused = 1 <= (error.retry_after or 0) <= 60
            assert refused, "told when to come again"
        else:
            self.answers[client, submit.id] = Answer(submit)
            return True
        assert self.scheduler.gauges() == before
        return False

    def cancel(self, client: int, number: int, choice: int | None) -> None:
        answer = self.answers[client, number]
        self.scheduler.cancel(number, choice, client)
        assert not self.scheduler.cancel(number, choice, client), "idempotent"
        every = set(range(len(answer.submit.settings)))
        wanted = every if choice is None else every & {choice}
        answer.cancelled |= wanted - answer.endings.keys()

    def lose_connection(self, client: int) -> None:
        self.scheduler.cancel_client(client)
        for (owner, _), answer in self.answers.items():
            if owner == client:
                every = set(range(len(answer.submit.settings)))
                answer.cancelled |= every - answer.endings.keys()

    # ---- what the engine does

    @property
    def flight(self) -> tuple[Step, StepResult] | None:
        """The one launched last."""
        return self.flights[-1] if self.flights else None

    def launch(self) -> None:
        """What happens before ``collect`` happens while the step is on the device."""
        if len(self.flights) < self.depth and not self._is_broken:
            self._launch()

    def collect(self, failing: int | None = None) -> None:
        if self.flights:
            step, result = self.flights.popleft()
            if failing is not None:
                result.rows[failing % len(result.rows)] = RowResult(error="not finite")
            self.now += 0.01
            self._deliver(self.scheduler.update(step, result))
            self._is_broken = self._is_broken and bool(self.flights)

    def abandon(self, *, lacks_memory: bool = False, has_run: bool = True) -> None:
        """What is under way raises: after it was done, or before."""
        if not self.flights and self.scheduler.has_work:
            self.raises = not has_run
            self.launch()
        if not self.flights:
            return
        for step, _ in self.flights:
            self.runner.abandon(step)
        self.flights.clear()
        self._is_broken = False
        self.now += 0.01
        self._deliver(self.scheduler.abandon("it raised", lacks_memory=lacks_memory))
        self.num_abandoned += 1

    def launch_in_vain(self) -> None:
        """The next step's launch raises: nothing of it was done."""
        self.collect()
        self.raises = self.scheduler.has_work
        self.launch()

    def run(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.turn()

    def turn(self) -> None:
        """As the engine's loop: the next step is launched, then the one before it is waited for."""
        if self.depth == 1:
            self.collect()
        self.launch()
        if self.depth == 2 and (len(self.flights) == 2 or self._waits):
            self.collect()
        while self._is_broken:
            self.collect()

    def let_time_pass(self, seconds: float) -> None:
        self.now += seconds
        self._deliver(self.scheduler.expire())

    def _launch(self) -> None:
        line = self.scheduler._lineup
        running = list(line.running)
        due = {sequence: sequence.num_due for sequence in running}
        tables = {sequence: sequence.block_table for sequence in running}
        step = self.scheduler.schedule()
        self._waits = step is None
        if step is None:
            assert self.flights or not self.scheduler.has_work
            return
        self.num_ahead += len(self.flights)
        for sequence in running:
            if sequence.block_table is not tables[sequence]:
                del due[sequence]  # preempted, and let in anew
        counts = [row.count for row in step.rows]
        rows = {row.sequence for row in step.rows}
        num_ahead = sum(row.num_ahead for row in step.rows)
        assert sum(counts) + num_ahead == step.num_tokens <= self.budget
        assert num_ahead <= self.speculation.most_in_step
        assert len(rows) == len(counts) <= self.max_num_seqs
        assert sorted(counts, key=lambda count: count > 1) == counts, "single tokens come first"
        is_trial = line.trials.current() is not None
        assert not is_trial or len(rows) == 1
        first = line.running[0]
        if not is_trial and len({sequence.account for sequence in line.running}) == 1:
            assert first in rows or not due.get(first, 1), "the first in line stands still"
        for sequence in [] if is_trial else running:
            is_left_out = sequence in line.running and sequence not in rows
            assert not (is_left_out and due.get(sequence) == 1), "a decode is left out"
        chunks = [sequence for sequence in line.running if due.get(sequence, 2) > 1]
        assert is_trial or not chunks or rows.intersection(chunks), "prompts stand still"
        self.num_copies += len(step.copies)
        self.num_stores += len(step.stores)
        self.num_loads += len(step.loads)
        if self.raises:
            self.raises = False
            self._is_broken = True
            self.flights.append((step, StepResult.failed(step, "raised before it began")))
            return
        self.flights.append((step, self.runner.run(step)))

    def _deliver(self, deliveries: Deliveries) -> None:
        for client, outputs in deliveries.items():
            for output in outputs:
                self.answers[client, output.id].take(output)

    # ---- what must always hold

    def check(self) -> None:
        self.pool.check()
        self._check_blocks()
        self._check_gauges()
        self._check_accounts()

    def _check_blocks(self) -> None:
        under_way = {row.sequence for step, _ in self.flights for row in step.rows}
        ended = {sequence for sequence in under_way if sequence.status is Status.FINISHED}
        holders = [*self.scheduler._lineup.running, *ended]
        held = Counter(block for sequence in holders for block in sequence.block_table)
        assert all(self.pool.holders(b) == held[b] for b in range(self.pool.num_blocks))
        assert self.pool.num_free == self.pool.num_usable - len(held)

    def _check_gauges(self) -> None:
        gauges = self.scheduler.gauges()
        unfinished = {
            sequence: len(sequence.choices)
            for request in self.scheduler._requests.values()
            for sequence in request.sequences.values()
        }
        waiting = {s: n for s, n in unfinished.items() if s.status is Status.WAITING}
        fresh = [s.num_prompt for s in waiting if s.request.first_scheduled is None]
        assert gauges.running == len(unfinished) - len(waiting) <= self.max_num_seqs
        assert gauges.waiting == sum(waiting.values())
        assert gauges.waiting_tokens == sum(fresh)
        assert not any(s.block_table for s in waiting)

    def _check_accounts(self) -> None:
        requests = self.scheduler._requests.values()
        active = self.scheduler._shares.active
        assert Counter(r.submit.account for r in requests) == Counter(
            {name: account.num_requests for name, account in active.items()}
        )
        assert all(request.account is active[request.submit.account] for request in requests)

    def end(self) -> None:
        """Everybody left gets an answer, and then every block is free."""
        for _ in range(STEPS_AT_MOST):
            self.turn()
            if not self.flights and not self.scheduler.has_work:
                break
        assert not self.scheduler.has_work
        assert self.scheduler.schedule() is None
        assert self.pool.num_free == self.pool.num_usable
        assert self.scheduler.gauges()[:3] == (0, 0, 0)
        self.pool.check()
        for answer in self.answers.values():
            answer.check(MAX_MODEL_LEN)
        self._check_counters()

    def _check_counters(self) -> None:
        counters, answers = self.scheduler.counters, self.answers.values()
        assert counters.generation_tokens == sum(
            len(tokens) for answer in answers for tokens in answer.tokens.values()
        )
        reasons = Counter(
            ending.finish_reason for answer in answers for ending in answer.endings.values()
        )
        reasons["cancelled"] = sum(len(answer.cancelled) for answer in answers)
        assert +reasons == counters.finished
        assert 0 <= counters.prefix_hits <= counters.prefix_queries
        told = [output for answer in answers for output in answer.outputs]
        proposed = sum(output.num_accepted + output.num_rejected for output in told)
        accepted = sum(output.num_accepted for output in told)
        assert proposed <= counters.spec_draft_tokens, "some were for choices gone by then"
        assert accepted <= counters.spec_accepted_tokens <= self.runner.num_accepted
        assert counters.spec_drafts <= counters.spec_draft_tokens
        assert 0 <= counters.host_hits <= counters.prefix_hits
        assert (counters.host_stores, counters.host_loads) == (self.num_stores, self.num_loads)
        assert counters.host_evictions == self.pool.host.num_evictions
