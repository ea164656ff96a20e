"""Who runs and who waits: fills a step from both, and preempts when memory runs out."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Iterable
from operator import attrgetter

from service.engine.adapters import AdapterTable, AdapterTurns
from service.engine.counters import Counters
from service.engine.paging import Paging
from service.engine.sequence import Sequence, Status
from service.engine.speculation import Speculator
from service.engine.step import Step, make_row
from service.engine.waiting import WaitingQueue

PROMPT_SHARE = 32  # tokens of every step's budget that running decodes cannot take
_order = attrgetter("order")


class Lineup:
    """``running`` is sorted: its first goes first, its last is preempted first.

    Liveness: the first of ``running`` can preempt all others, and alone it fits, because admission
    refuses what would not. Only preemption and the end take blocks from a running sequence.
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
    ) -> None:
        self.running: list[Sequence] = []
        self.waiting = waiting
        share = min(PROMPT_SHARE, max_num_batched_tokens // 2)
        self.max_num_seqs = min(max_num_seqs, max_num_batched_tokens - share)
        self.budget = max_num_batched_tokens
        self._paging = paging
        self._counters = counters
        self._clock = clock
        self._speculator = speculator
        self._max_model_len = max_model_len
        self._adapters = adapters
        self._turns = AdapterTurns(adapters.num_slots, clock)

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

    def fill(self, step: Step, *, may_guess: bool = True) -> None:
        """One token for every decoding sequence, then chunks of prompts within the budget.

        What is left of it may go to guesses, which start from tokens that are known.
        """
        self._fill_decodes(step)
        self._fill_prompts(step)
        if self._adapters.num_slots:
            self._place_adapters(step)
        step.put_in_order()
        room = self.budget - step.num_tokens if may_guess else 0
        self._speculator.extend(step, room, self._max_model_len, self._paging)
        self._settle_host(step)

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

    def _fill_decodes(self, step: Step) -> None:
        i = 0
        while i < len(self.running):  # preemption shortens it from the end
            sequence = self.running[i]
            if sequence.num_due == 1 and self._make_writable(sequence, step):
                self._advance(sequence, 1, step)
            i += 1

    def _make_writable(self, sequence: Sequence, step: Step) -> bool:
        """Preempts from the back of the line until there is a block, itself at the latest."""
        while not self._paging.is_writable(sequence):
            if self._paging.pool.num_free:
                self._paging.make_writable(sequence, step.copies)
                return True
            victim = self.running.pop()
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._paging.release(sequence)
        self._send_back(sequence)
        self._counters.preemptions += 1

    def _send_back(self, sequence: Sequence) -> None:
        sequence.status = Status.WAITING
        self.waiting.push_front(sequence)

    # ---- prompts -------------------------------------------------------------------------------

    def _fill_prompts(self, step: Step) -> None:
        """Chunks in order; one that waits and comes first in it goes before those that run."""
        may_admit = True
        self._turns.begin(self.running)
        prompts = deque(sequence for sequence in self.running if sequence.num_due > 1)
        while step.num_tokens < self.budget:
            head = self._next() if may_admit else None
            if head is not None and not (prompts and prompts[0].order < head.order):
                may_admit = self._admit(head, step)
                if may_admit:
                    prompts.appendleft(head)
            elif prompts:
                sequence = prompts.popleft()
                self._advance(sequence, min(sequence.num_due, self.budget - step.num_tokens), step)
            else:
                break

    def _next(self) -> Sequence | None:
        if not self._adapters.num_slots:
            return self.waiting.peek()
        return self.waiting.peek(self._turns.next_turn())

    def _admit(self, sequence: Sequence, step: Step) -> bool:
        if self.free_slots <= 0:
            return False
        known = len(step.loads)
        if not self._paging.claim(sequence, self._headroom(), step.copies, step.loads):
            return False
        self.waiting.remove(sequence)
        sequence.status = Status.RUNNING
        insort(self.running, sequence, key=_order)
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
        reads_cache = request.prompt_logprobs is None and request.submit.pooling != "mean"
        if self._paging.pool.enable_prefix_caching and reads_cache:
            self._counters.prefix_queries += sequence.num_prompt
            self._counters.prefix_hits += sequence.num_computed
            self._counters.host_hits += num_loaded

    def _advance(self, sequence: Sequence, count: int, step: Step) -> None:
        step.rows.append(make_row(sequence, count))
        step.num_tokens += count
