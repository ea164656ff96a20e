"""Who runs and who waits: fills a step from both, and preempts when memory runs out."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Iterable
from operator import attrgetter

from service.engine.adapters import AdapterTable, AdapterTurns
from service.engine.counters import Counters
from service.engine.fair_prompts import share_out
from service.engine.fair_queue import FairQueue
from service.engine.fair_share import DECODE_COST
from service.engine.paging import Paging
from service.engine.sequence import Sequence, Status
from service.engine.speculation import Speculator
from service.engine.step import Step, make_row
from service.engine.step_bounds import PROMPT_SHARE, StepBounds
from service.engine.trial import Trials
from service.engine.waiting import WaitingQueue
from service.engine.yielding import Room, Yielding, by_share_of_pages

PIECES = 8  # of a step's budget: prompts of different accounts share it so
_order = attrgetter("order")


class Lineup:
    """``running`` is sorted: its first goes first, its last is preempted first.

    Liveness: the first of ``running`` can preempt all others, and alone it fits, because admission
    refuses what would not. Only preemption and the end take blocks from a running sequence.

    With several accounts the line is another one: the last is the youngest of the account that
    holds the most pages for its weight. Each preemption lets somebody draw a token that was never
    drawn before, or leaves those that go on computing, so all come to their ends.
    """

    def __init__(
        self,
        paging: Paging,
        waiting: WaitingQueue,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        counters: Counters,
        clock: Callable[[], float],
        speculator: Speculator,
        max_model_len: int,
        adapters: AdapterTable,
        fair: FairQueue | None,
    ) -> None:
        """``fair`` is ``waiting`` itself, where accounts share."""
        self.running: list[Sequence] = []
        self.waiting = waiting
        self._bounds = StepBounds(max_num_seqs, max_num_batched_tokens)
        self.trials = Trials()
        self._piece = max(PROMPT_SHARE, max_num_batched_tokens // PIECES)
        self._paging = paging
        self._counters = counters
        self._clock = clock
        self._speculator = speculator
        self._max_model_len = max_model_len
        self._adapters = adapters
        self._turns = AdapterTurns(adapters.num_slots, clock)
        self._fair = fair
        if fair is not None:
            pages_for, pages_freed = paging.pages_wanted, paging.pages_held_alone
            self._yielding = Yielding(fair.shares, fair, pages_for, pages_freed)

    @property
    def max_num_seqs(self) -> int:
        return self._bounds.max_num_seqs

    @property
    def budget(self) -> int:
        return self._bounds.budget

    @property
    def free_slots(self) -> int:
        return self.max_num_seqs - len(self.running)

    @property
    def can_spare_pages(self) -> bool:
        """Whether every decoding sequence gets its next token's page, and nobody is preempted."""
        free, writable = self._paging.pool.num_free, self._paging.is_writable
        return free >= len(self.running) or free >= sum(
            not writable(sequence) for sequence in self.running if sequence.num_due == 1
        )

    def fill(self, step: Step, *, is_ahead: bool = False) -> None:
        """One token for every decoding sequence, then chunks of prompts within the budget.

        What is left of it may go to guesses, which start from tokens that are known: not ahead of
        the step that draws them.
        """
        self._bounds.widen()
        fair = self._fair
        if (suspect := self.trials.current()) is not None:
            self._fill_trial(suspect, step)
            self._finish(step, is_ahead=True)
        elif fair is None or not fair.shares.is_contended:
            self._fill_decodes(step, self.running)
            num_decodes = step.num_tokens
            self._fill_prompts(step)
            num_known = self._finish(step, is_ahead)
            if fair is not None:
                num_rows = num_decodes + step.num_tokens - num_known
                fair.shares.charge_only(DECODE_COST * num_rows + num_known - num_decodes)
        else:
            if not is_ahead:
                self._make_way()
            spares = self.can_spare_pages
            self._fill_decodes(step, self.running if spares else by_share_of_pages(self.running))
            fair.shares.charge_decodes(step.rows)
            self._fill_prompts_fairly(step, fair)
            if step.num_tokens > self._finish(step, is_ahead):
                fair.shares.charge_guesses(step.rows)

    def _finish(self, step: Step, is_ahead: bool) -> int:
        """Adapters, order, guesses, host memory; the tokens it had before any were guessed."""
        if self._adapters.num_slots:
            self._place_adapters(step)
        step.put_in_order()
        num_known = step.num_tokens
        room = 0 if is_ahead else self.budget - num_known
        self._speculator.extend(step, room, self._max_model_len, self._paging)
        self._settle_host(step)
        return num_known

    def _settle_host(self, step: Step) -> None:
        pool, counters = self._paging.pool, self._counters
        step.stores = pool.take_stores()
        counters.host_stores += len(step.stores)
        counters.host_loads += len(step.loads)
        counters.host_evictions = pool.host.num_evictions

    def _place_adapters(self, step: Step) -> None:
        adapted = [row for row in step.rows if row.sequence.adapter]
        slots, step.fills = self._adapters.place(row.sequence.adapter for row in adapted)
        for row in adapted:
            row.adapter = slots[row.sequence.adapter]

    def run_forks(self, children: Iterable[Sequence]) -> None:
        """Their tables are shared. Those beyond max_num_seqs wait, their prompt cached."""
        for child in children:
            if self.free_slots > 0:
                self._paging.share(child)
                insort(self.running, child, key=_order)
            else:
                child.forget_pages()
                self._send_back(child)

    def remove(self, sequence: Sequence) -> None:
        """It has ended: out of the line or the queue, its blocks given back."""
        if sequence.status is Status.WAITING:
            self.waiting.remove(sequence)
        elif sequence.status is Status.RUNNING:
            del self.running[self._position(sequence)]
            self.release_unused(sequence)
        sequence.status = Status.FINISHED

    def release_unused(self, sequence: Sequence) -> None:
        """Of one that has ended: its blocks, unless a step under way may still write to them."""
        if not sequence.num_rows:
            self._paging.release(sequence)

    def _position(self, sequence: Sequence) -> int:
        i = bisect_left(self.running, sequence.order, key=_order)
        assert self.running[i] is sequence, "not running"
        return i

    # ---- decodes -------------------------------------------------------------------------------

    def _fill_decodes(self, step: Step, line: list[Sequence]) -> None:
        i = 0
        while i < len(line):  # preemption shortens it from the end
            sequence = line[i]
            if sequence.num_due == 1 and self._make_writable(sequence, step, line):
                self._advance(sequence, 1, step)
            i += 1

    def _make_writable(self, sequence: Sequence, step: Step, line: list[Sequence]) -> bool:
        """Preempts from the back of the line until there is a block, itself at the latest."""
        while not self._paging.is_writable(sequence):
            if self._paging.pool.num_free:
                self._paging.make_writable(sequence, step.copies)
                return True
            victim = line.pop()
            if line is not self.running:
                del self.running[self._position(victim)]
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        sequence.num_reached = max(sequence.num_reached, sequence.num_computed)
        self._paging.release(sequence)
        self._send_back(sequence)
        self._counters.preemptions += 1

    def _send_back(self, sequence: Sequence) -> None:
        sequence.status = Status.WAITING
        self.waiting.push_front(sequence)

    # ---- places for accounts below their share -------------------------------------------------

    def leaving(self) -> list[Sequence]:
        """Those that are to stop running, for accounts that hold less than theirs and wait."""
        fair = self._fair
        if fair is None or not fair.shares.is_contended or not len(fair):
            return []
        pages = self._paging.pool.num_free - self._headroom()
        room = Room(self.free_slots, pages, self.budget - len(self.running))
        if not self._adapters.num_slots:
            return self._yielding.plan(self.running, room)
        self._turns.begin(self.running)
        return self._yielding.plan(self.running, room, self._turns.next_turn())

    def _make_way(self) -> None:
        for sequence in self.leaving():
            del self.running[self._position(sequence)]
            self._preempt(sequence)
            self._counters.yields += 1

    # ---- after a step that raised --------------------------------------------------------------

    def put_back(self, sequence: Sequence) -> None:
        """It is to be computed anew: what the step did to its pages is not known."""
        del self.running[self._position(sequence)]
        self._preempt(sequence)

    def narrow(self, num_rows: int, num_tokens: int) -> bool:
        """Memory did not do for a step of so many; False where it can be made no smaller.

        The youngest go back to the queue.
        """
        can_narrow = self._bounds.narrow(num_rows, num_tokens)
        while len(self.running) > self.max_num_seqs:
            self._preempt(self.running.pop())
        return can_narrow

    def _fill_trial(self, sequence: Sequence, step: Step) -> None:
        """This one alone; the others keep what they have, unless it needs their pages."""
        if sequence.status is Status.WAITING:
            while not self._paging.claim(sequence, 0, step.copies, step.loads):
                self._preempt(self._last_but(sequence))
            self._take_in(sequence)
        while sequence.num_due == 1 and not self._paging.is_writable(sequence):
            if self._paging.pool.num_free:
                self._paging.make_writable(sequence, step.copies)
            else:
                self._preempt(self._last_but(sequence))
        self._advance(sequence, min(sequence.num_due, self.budget), step)

    def _last_but(self, sequence: Sequence) -> Sequence:
        """Out of those that run, the last one but this."""
        return self.running.pop(-1 if self.running[-1] is not sequence else -2)

    def _take_in(self, sequence: Sequence) -> None:
        self.waiting.remove(sequence)
        sequence.status = Status.RUNNING
        insort(self.running, sequence, key=_order)
        sequence.num_redone = max(0, sequence.num_reached - sequence.num_computed)

    # ---- prompts -------------------------------------------------------------------------------

    def _fill_prompts(self, step: Step) -> None:
        """Chunks in order; one that waits and comes first in it goes before those that run."""
        may_admit = True
        self._turns.begin(self.running)
        prompts = deque(sequence for sequence in self.running if sequence.num_due > 1)
        while step.num_tokens < self.budget:
            head = self._next() if may_admit else None
            if head is not None and not (prompts and prompts[0].order < head.order):
                may_admit = self.free_slots > 0 and self._admit(head, step, self._headroom())
                if may_admit:
                    prompts.appendleft(head)
            elif prompts:
                sequence = prompts.popleft()
                self._advance(sequence, min(sequence.num_due, self.budget - step.num_tokens), step)
            else:
                break

    def _fill_prompts_fairly(self, step: Step, fair: FairQueue) -> None:
        self._turns.begin(self.running)
        headroom = self._headroom() if len(fair) else 0

        def admit(sequence: Sequence) -> bool:
            nonlocal headroom
            if self.free_slots <= 0 or not self._admit(sequence, step, headroom):
                return False
            headroom += self._paging.wants_page_soon(sequence)
            return True

        pieces = share_out(
            (sequence for sequence in self.running if sequence.num_due > 1),
            fair,
            admit,
            self.budget - step.num_tokens,
            self._piece,
            self._turns.next_turn() if self._adapters.num_slots else None,
        )
        for sequence, count in pieces.items():
            self._advance(sequence, count, step)

    def _next(self) -> Sequence | None:
        if not self._adapters.num_slots:
            return self.waiting.peek()
        return self.waiting.peek(self._turns.next_turn())

    def _admit(self, sequence: Sequence, step: Step, headroom: int) -> bool:
        known = len(step.loads)
        if not self._paging.claim(sequence, headroom, step.copies, step.loads):
            return False
        self._take_in(sequence)
        self._turns.joined(sequence)
        if sequence.request.first_scheduled is None:
            self._note_first_step(sequence, sum(tokens for _, _, tokens in step.loads[known:]))
        return True

    def _headroom(self) -> int:
        """Blocks that those running want shortly: given away they would be taken back at once."""
        return sum(map(self._paging.wants_page_soon, self.running))

    def _note_first_step(self, sequence: Sequence, num_loaded: int) -> None:
        request = sequence.request
        request.first_scheduled = self._clock()
        request.cached_tokens = sequence.num_computed
        may_skip = request.prompt_logprobs is None or request.submit.logprobs_from > 1
        reads_cache = may_skip and request.submit.pooling != "mean"
        if self._paging.pool.enable_prefix_caching and reads_cache:
            self._counters.prefix_queries += sequence.num_prompt
            self._counters.prefix_hits += sequence.num_computed
            self._counters.host_hits += num_loaded

    def _advance(self, sequence: Sequence, count: int, step: Step) -> None:
        step.rows.append(make_row(sequence, count))
        step.num_tokens += count
