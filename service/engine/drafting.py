"""A second, smaller network that proposes: what it would draw, drawn as the model would.

It shares block tables with the model: its cache has as many pages of as many tokens, so whatever
the scheduler decides about pages (sharing, copies, preemption) holds for both. What may differ is
how much of a page the draft model has computed, which is counted here page by page. It computes
nothing before a sequence is to get proposals and then catches up, so a batch in which guessing does
not pay costs it nothing.

Its draws take the model's own settings and uniforms: where both networks agree on a distribution
they agree on the token, also when sampling.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from model.batch import Batch, BatchBuilder, BatchRow
from model.kv_cache import KVCache
from model.llama import Llama
from model.sampler import Sampler
from model.sampling_row import DrawError, SamplingRow
from service.engine.capacity import Limits
from service.engine.sequence import Choice, Sequence
from service.engine.speculation import DRAFT
from service.engine.step import Row, Step
from service.redaction import Redacted

if TYPE_CHECKING:
    from torch import Tensor

    from model.cuda_graphs import DecodeGraphs

# (sequence, choice, row of the logits, tokens proposed so far) -> how the next one is drawn
SamplingRowOf = Callable[[Row, Choice, int, list[int]], SamplingRow]
SINGLES = 2  # tokens to catch up with that are laid out as rows of one token each


@dataclass(slots=True, repr=False)
class _Pending(Redacted):
    """A row that is being drafted for; ``rows`` go into the next pass."""

    row: Row
    wanted: int
    rows: list[BatchRow]
    samples: bool  # False while it catches up with a long text


class Drafter:
    def __init__(self, model: Llama, cache: KVCache, limits: Limits) -> None:
        self.model, self.cache = model, cache
        self._computed = [0] * cache.num_blocks  # of each page, first tokens that are computed
        self._max_positions = model.config.max_positions
        self._max_tokens = limits.max_num_batched_tokens
        self._max_rows = SINGLES * limits.max_num_seqs
        self._max_blocks = limits.blocks_a_sequence
        self._sampler = Sampler(model.config.vocab_size, model.device)
        self._builder = BatchBuilder(
            max_tokens=max(self._max_tokens, self._max_rows),
            max_rows=self._max_rows,
            max_blocks=self._max_blocks,
            block_size=limits.block_size,
            device=model.device,
        )
        self._graphs: DecodeGraphs | None = None

    def capture_graphs(self) -> None:
        """As the runner does for the model."""
        if self.model.device.type != "cuda":
            return
        from model.cuda_graphs import DecodeGraphs

        if DecodeGraphs.can_capture(self.model):
            self._graphs = DecodeGraphs(self.model, self.cache, self._max_rows, self._max_blocks)
            self._graphs.capture()

    def propose(self, step: Step, sampling_row: SamplingRowOf) -> list[tuple[int, float]]:
        """Fills ``proposed`` of the rows that want it; (rows, seconds) of each plain pass."""
        self._follow(step)
        pending = self._begin([row for row in step.rows if _wants_draft(row)])
        passes = []
        while pending:
            began = time.perf_counter()
            num_rows = self._advance(pending, sampling_row)
            if num_rows:
                passes.append((num_rows, time.perf_counter() - began))
            pending = [each for each in pending if self._goes_on(each)]
        return passes

    # ---- what is computed

    def _follow(self, step: Step) -> None:
        """What the step does to pages ends what the draft model knew of them."""
        if step.copies:
            self.cache.copy(step.copies)
        for source, target, tokens in step.copies:
            self._computed[target] = min(self._computed[source], tokens)
        for _, block, _ in step.loads:  # what comes from the host is the model's alone
            self._computed[block] = 0
        for row in step.rows:
            self._forget(row.sequence.block_table, row.start, row.end + row.num_ahead)

    def _forget(self, table: list[int], start: int, end: int) -> None:
        size = self.cache.block_size
        page, used = divmod(start, size)
        self._computed[table[page]] = min(self._computed[table[page]], used)
        for block in table[page + 1 : -(-end // size)]:
            self._computed[block] = 0

    def _num_computed(self, sequence: Sequence) -> int:
        found = 0
        for block in sequence.block_table:
            found += self._computed[block]
            if self._computed[block] < self.cache.block_size:
                break
        return found

    def _note(self, table: list[int], end: int) -> None:
        """Everything before position ``end`` is computed."""
        size = self.cache.block_size
        for page in range(-(-end // size)):
            self._computed[table[page]] = max(
                self._computed[table[page]], min(end - page * size, size)
            )

    # ---- passes

    def _begin(self, rows: list[Row]) -> list[_Pending]:
        """First what each sequence lacks, in all as many tokens as a step may have."""
        room, pending = self._max_tokens, []
        taken: set[int] = set()  # pages that are caught up with: a shared one once is enough
        for row in rows:
            sequence, table = row.sequence, row.sequence.block_table
            wanted = min(row.num_ahead, self._max_positions - len(sequence.tokens))
            first = self._num_computed(sequence)
            page = first // self.cache.block_size
            if wanted <= 0 or not room or table[page] in taken:
                continue
            lacking = sequence.tokens[first : first + room]
            taken.update(table[page:])
            samples = first + len(lacking) == len(sequence.tokens)
            pending.append(_Pending(row, wanted, _laid_out(lacking, first, table), samples))
            room -= len(lacking)
        return pending

    def _advance(self, pending: list[_Pending], sampling_row: SamplingRowOf) -> int:
        """One pass; how many rows it had, 0 where some were longer than plain decoding's."""
        pending.sort(key=_is_chunk)
        rows = [row for each in pending for row in each.rows]
        logits = self._forward(self._builder.build(rows))
        places = itertools.accumulate(len(each.rows) for each in pending)  # past its last logits
        sampling = [(each, past - 1) for each, past in zip(pending, places, strict=True)]
        sampling = [(each, place) for each, place in sampling if each.samples]
        drawn = self._sampler.launch(
            logits,
            [
                sampling_row(each.row, each.row.choices[0], place, each.row.proposed)
                for each, place in sampling
            ],
        ).collect()
        for each in pending:
            last = each.rows[-1]
            self._note(each.row.sequence.block_table, last.start + len(last.tokens))
        for (each, _), draw in zip(sampling, drawn, strict=True):
            if draw.error is DrawError.NOT_FINITE:
                self._cleanse(each)
            if draw.error is not None:
                each.samples = False
                continue
            each.row.proposed.append(draw.token)
        return 0 if any(map(_is_chunk, pending)) else len(rows)

    def _forward(self, batch: Batch) -> Tensor:
        if self._graphs is not None:
            return self._graphs.forward(batch)
        return self.model.forward(batch, self.cache)

    def _goes_on(self, each: _Pending) -> bool:
        """Lays out the next pass: the token just proposed."""
        proposed, sequence = each.row.proposed, each.row.sequence
        if not each.samples or len(proposed) == each.wanted:
            return False
        position = len(sequence.tokens) + len(proposed) - 1
        each.rows = [BatchRow(proposed[-1:], position, sequence.block_table, 1)]
        return True

    def _cleanse(self, each: _Pending) -> None:
        """Masked keys are multiplied by zero, which only helps against numbers."""
        each.row.gives_up = True
        first, last = each.rows[0], each.rows[-1]
        size, table = self.cache.block_size, last.block_table
        self.cache.cleanse(table[first.start // size : -(-(last.start + 1) // size)])


def _laid_out(tokens: list[int], start: int, table: list[int]) -> list[BatchRow]:
    """A few tokens as rows of one, which decoding's kernels take; more as one chunk.

    Every row has logits: a plain step for CUDA graphs is one where each has.
    """
    if len(tokens) > SINGLES:
        return [BatchRow(tokens, start, table, 1)]
    return [BatchRow([token], start + i, table, 1) for i, token in enumerate(tokens)]


def _is_chunk(each: _Pending) -> bool:
    return len(each.rows[0].tokens) > 1


def _wants_draft(row: Row) -> bool:
    return row.num_ahead > 0 and row.choices[0].settings.speculative_method == DRAFT
