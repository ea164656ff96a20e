"""Integers in, integers out: the one place of the service where a step becomes tensors.

Three stages, forward, mask, sample, in two halves: ``launch`` queues them (on a GPU it returns
while the device works), ``collect`` waits for what was drawn.
"""

from __future__ import annotations

import gc
import itertools
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from model.batch import Batch, BatchBuilder, BatchRow
from model.host_cache import HostCache
from model.kv_cache import KVCache
from model.llama import Llama
from model.logprobs import RawLogprob
from model.lora import Adapter, LowRank, read_adapter
from model.penalties import PenaltyState
from model.pooling import StatePool
from model.sampler import Drawn, Sampler
from model.sampling_row import Draw as RawDraw
from model.sampling_row import DrawError, Packed, SamplingRow
from model.stopwatch import Stopwatch
from service.engine.capacity import Limits
from service.engine.constrained import ConstrainedRows, StepMasks
from service.engine.drafting import Drafter
from service.engine.messages import SamplingSettings, TokenLogprob
from service.engine.sequence import Choice, Sequence, Status
from service.engine.step import Draw, Row, RowResult, Step, StepResult, agreed
from service.redaction import Redacted

if TYPE_CHECKING:
    from model.cuda_graphs import DecodeGraphs

LEAST_LOGPROB = -9999.0  # as OpenAI writes what has no probability: JSON has no infinity
NOT_FINITE = "the model's logits are not finite"
HEAD_SLICE = 256  # prompt tokens whose logits exist at a time: 128 MB of a vocabulary of 128k


@dataclass(slots=True, repr=False)
class Launched(Redacted):
    """A step on its way. With prompt chunks the last residual stream is kept, [T, hidden]."""

    step: Step
    draft_passes: list[tuple[int, float]]  # rows, seconds of each
    drawn: Drawn | None
    hidden: Tensor | None
    is_finite: Tensor | None  # [T] bool, of ``hidden``
    forward: Stopwatch
    masks: StepMasks | None = None  # of rows that follow a grammar

    @property
    def places(self) -> list[int | None]:
        """By row, where among the tokens drawn its first is."""
        places = self.drawn.places if self.drawn is not None else []
        firsts = itertools.accumulate((len(row.choices) for row in self.step.rows), initial=0)
        rows = zip(self.step.rows, firsts, strict=False)
        return [places[first] if row.choices else None for row, first in rows]


@dataclass(slots=True, repr=False)
class KeptChoice(Redacted):
    """What one choice's draws have in common from step to step."""

    sequence: Sequence
    penalties: PenaltyState | None
    packed: Packed = field(default_factory=Packed)


class ModelRunner:
    """Owns the network, its cache and what a choice's draws share; knows no clients or queues."""

    def __init__(
        self,
        model: Llama,
        cache: KVCache,
        limits: Limits,
        drafter: Drafter | None = None,
        host: HostCache | None = None,
        max_lora_rank: int = 0,
    ) -> None:
        self.model = model
        self.cache = cache
        self.drafter = drafter
        self.host = host  # keeps what is evicted from the cache
        self._sampler = Sampler(model.config.vocab_size, model.device)
        self._builder = BatchBuilder(
            max_tokens=limits.max_num_batched_tokens,
            max_rows=limits.max_rows,
            max_blocks=limits.blocks_a_sequence,
            block_size=limits.block_size,
            device=model.device,
        )
        self._limits = limits
        self._graphs: DecodeGraphs | None = None
        self._kept: dict[tuple[int, int], KeptChoice] = {}  # by request and choice
        self._constrained = ConstrainedRows()
        self._pools: dict[int, tuple[Sequence, StatePool]] = {}  # by request, between its chunks
        self._adapters: dict[int, Adapter] = {}  # by version, in the host's memory
        self._max_rank = max_lora_rank

    @property
    def num_kept_choices(self) -> int:
        return len(self._kept)

    def capture_graphs(self) -> None:
        """Record decode steps for replay where the device and the attention backend allow it."""
        if self.model.device.type != "cuda":
            return
        from model.cuda_graphs import DecodeGraphs

        if DecodeGraphs.can_capture(self.model):
            limits = self._limits
            graphs = DecodeGraphs(self.model, self.cache, limits.max_rows, limits.blocks_a_sequence)
            graphs.capture()
            self._graphs = graphs
        if self.drafter is not None:
            self.drafter.capture_graphs()

    def read_adapter(self, folder: str) -> Adapter:
        """Any thread may. Raises ValueError with a line that a client may be told."""
        adapter = read_adapter(Path(folder), self._shapes(), self._max_rank, self.model.dtype)
        return adapter.pinned() if self.model.device.type == "cuda" else adapter

    def fill_slot_for_warm_up(self, *, is_used: bool) -> None:
        """Slot 0 with an adapter that adds nothing, so that kernels run; or empty again."""
        weights = {}
        if is_used:
            for name, (outputs, inputs) in self._shapes().items():
                make = partial(torch.zeros, dtype=self.model.dtype)
                weights[name] = LowRank(make(1, inputs), make(1, outputs))
        self.model.fill_adapter_slot(0, Adapter(weights))

    def _shapes(self) -> dict[str, tuple[int, int]]:
        return {name: one.shape for name, one in self.model.projections().items()}

    def keep_adapter(self, version: int, adapter: Adapter) -> None:
        self._adapters[version] = adapter

    def drop_adapter(self, version: int) -> None:
        del self._adapters[version]

    def run(self, step: Step) -> StepResult:
        return self.collect(self.launch(step))

    def is_fatal(self, error: Exception) -> bool:
        """A device error leaves the device's state unknown; memory that ran out does not."""
        return isinstance(error, torch.AcceleratorError)

    def lacks_memory(self, error: Exception) -> bool:
        """The device's or the host's: a smaller step may do."""
        return isinstance(error, torch.OutOfMemoryError | MemoryError)

    def abandon(self, step: Step) -> None:
        """It raised: what was kept for its sequences may be ahead of them, and is made anew."""
        self._constrained.forget(step)
        for row in step.rows:
            self._pools.pop(row.sequence.request.number, None)

    def free_memory(self) -> None:
        """What nobody uses and the allocators keep."""
        gc.collect()
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def launch(self, step: Step, before: Launched | None = None) -> Launched:
        """Queue the step on the device; ``before`` is the one whose draws feed it."""
        masks = self._constrained.start(step)
        try:
            return self._launch(step, before, masks)
        except BaseException:
            if masks is not None and masks.filling is not None:
                masks.filling.wait()  # threads write to what the next step uses
            raise

    def _launch(self, step: Step, before: Launched | None, masks: StepMasks | None) -> Launched:
        self._move_pages(step)
        for slot, version in step.fills:
            self.model.fill_adapter_slot(slot, self._adapters[version])
        passes = self.drafter.propose(step, self._sampling_row) if self.drafter is not None else []
        batch = self._build(step, before)
        has_chunks = any(row.count > 1 or not row.choices for row in step.rows)
        forward = Stopwatch(self.model.device)
        logits, hidden = self._forward(batch, has_chunks)
        forward.stop()
        is_finite = hidden.isfinite().all(-1) if hidden is not None else None
        rows = self._sampling_rows(step.rows)
        if masks is not None:
            self._constrained.restrict(masks, step, rows)
        drawn = self._sampler.launch(logits, rows) if rows else None
        return Launched(step, passes, drawn, hidden, is_finite, forward, masks)

    def _build(self, step: Step, before: Launched | None) -> Batch:
        """Tokens that ``before`` draws are put in on the device: the host never sees them here."""
        rows = [own for row in step.rows for own in _batch_rows(row)]
        if all(row.token_from is None for row in step.rows):
            return self._builder.build(rows)
        assert before is not None, "a step that is fed needs the one before it"
        assert before.drawn is not None, "fed by a step that draws nothing"
        places = before.places
        for row, own in zip(rows, step.rows, strict=True):  # nothing is proposed in such a step
            if own.token_from is not None:
                place = places[own.token_from]
                assert place is not None, "fed by a row that draws nothing"
                row.drawn_at = place
        return self._builder.build(rows, before.drawn.tokens)

    def _move_pages(self, step: Step) -> None:
        if self.host is not None and step.stores:
            self.host.store(step.stores)
        if step.copies:
            self.cache.copy(step.copies)
        if self.host is not None and step.loads:
            self.host.load(step.loads)

    @torch.inference_mode()
    def collect(self, launched: Launched) -> StepResult:
        """Wait for the draws and hand them to the rows they belong to."""
        draws = iter(launched.drawn.collect() if launched.drawn is not None else [])
        is_finite = launched.is_finite.tolist() if launched.is_finite is not None else None
        results, first = [], 0
        for row in launched.step.rows:
            own = [next(draws) for _ in row.choices]
            if row.proposed:
                own += [next(draws) for _ in row.proposed]
                results.append(self._speculative_result(row, own))
            elif is_finite is not None and not all(is_finite[first : first + row.count]):
                results.append(RowResult(error=NOT_FINITE))
            else:
                results.append(_result(own, self._prompt_logprobs(row, launched.hidden, first)))
                if launched.masks is not None:
                    results[-1] = self._constrained.follow(launched.masks, row, results[-1])
            if results[-1].error is not None:
                if not results[-1].is_refusal:
                    self._cleanse(row)
            elif row.num_pooled:
                assert launched.hidden is not None, "hidden states were not kept"
                end = first + row.count
                hidden = launched.hidden[end - row.num_pooled : end]
                results[-1].pooled = self._pool(row, hidden)
            first += row.count + len(row.proposed)
        self._forget_finished()
        return StepResult(results, launched.draft_passes, model_seconds=launched.forward.seconds)

    def _speculative_result(self, row: Row, draws: list[RawDraw]) -> RowResult:
        """The draws that count. Where one went wrong only those before it, if any, are sure.

        A proposed token may bring numbers that are none, which rows before it may see through the
        mask: what is not sure is done again without proposals, and fails then if it was to fail.
        """
        wrong = next((i for i, draw in enumerate(draws) if draw.error is not None), None)
        if any(draw.error is DrawError.NOT_FINITE for draw in draws):
            self._cleanse(row)
        row.gives_up |= wrong is not None
        sure = _result(draws[:wrong], []).draws
        return RowResult(agreed(row.proposed, sure))

    def _cleanse(self, row: Row) -> None:
        """What is no number must not stay in pages.

        Only what this step computed can hold any, and the scheduler does not offer it for sharing.
        """
        size = self.cache.block_size
        end = row.end + len(row.proposed)
        self.cache.cleanse(row.sequence.block_table[row.start // size : -(-end // size)])

    def _forward(self, batch: Batch, has_chunks: bool) -> tuple[Tensor, Tensor | None]:
        """Logits of the rows that sample; with chunks the last residual stream, to be looked at."""
        if has_chunks:
            last: dict[int, Tensor] = {}
            logits = self.model.forward(batch, self.cache, taps=lambda _, x: last.update({0: x}))
            return logits, last[0]
        return self.forward(batch), None

    def forward(self, batch: Batch) -> Tensor:
        """Logits of the rows that ask for them, by graph where one was captured."""
        if self._graphs is not None:
            return self._graphs.forward(batch)
        return self.model.forward(batch, self.cache)

    def _sampling_rows(self, rows: list[Row]) -> list[SamplingRow]:
        found: list[SamplingRow] = []
        logits_row = 0
        for row in rows:
            for choice in row.choices:
                found += [
                    self._sampling_row(row, choice, logits_row + i, row.proposed[:i])
                    for i in range(1 + len(row.proposed))
                ]
            if row.choices:
                logits_row += 1 + len(row.proposed)
        return found

    def _sampling_row(
        self, row: Row, choice: Choice, logits_row: int, ahead: list[int]
    ) -> SamplingRow:
        """How the token after the row's own and those ``ahead`` of them is drawn."""
        settings, kept = choice.settings, self._keep(row.sequence, choice)
        penalties = kept.penalties
        return SamplingRow(
            logits_row=logits_row,
            seed=settings.seed,
            choice=settings.choice,
            position=row.end + len(ahead),
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
            min_p=settings.min_p,
            presence_penalty=settings.presence_penalty,
            frequency_penalty=settings.frequency_penalty,
            repetition_penalty=settings.repetition_penalty,
            logit_bias=settings.logit_bias,
            allowed=settings.allowed_token_ids,
            banned=_banned(settings, row, ahead),
            penalties=penalties.ahead(ahead) if penalties is not None and ahead else penalties,
            logprobs=settings.logprobs,
            packed=kept.packed,
        )

    def _keep(self, sequence: Sequence, choice: Choice) -> KeptChoice:
        """Kept from step to step, so that a step costs what is new."""
        key = (sequence.request.number, choice.index)
        kept = self._kept.get(key)
        if kept is None:
            kept = self._kept[key] = KeptChoice(sequence, _penalty_state(sequence, choice.settings))
        kept.sequence = sequence  # a fork goes on in one of its own
        if kept.penalties is not None:
            kept.penalties.catch_up(sequence.tokens)
        return kept

    def _forget_finished(self) -> None:
        gone = [key for key, kept in self._kept.items() if kept.sequence.status is Status.FINISHED]
        for key in gone:
            del self._kept[key]
        self._constrained.forget_finished()
        for number in [n for n, (own, _) in self._pools.items() if own.status is Status.FINISHED]:
            del self._pools[number]

    def _pool(self, row: Row, hidden: Tensor) -> bytes | None:
        """Takes in the states of its tokens; what came of them once the prompt is through."""
        sequence = row.sequence
        number = sequence.request.number
        _, pool = self._pools.pop(number, (sequence, StatePool()))
        pool.add(self.model.states(hidden))
        if row.end == sequence.num_prompt:
            return pool.mean()
        self._pools[number] = (sequence, pool)
        return None

    def _prompt_logprobs(self, row: Row, hidden: Tensor | None, first: int) -> list[TokenLogprob]:
        """Of ``row.targets``; the row's hidden states begin at ``first``. The head in slices."""
        if not row.num_targets:
            return []
        assert hidden is not None, "hidden states were not kept"
        wanted = row.sequence.request.submit.prompt_logprobs or 0
        start = first + row.count - row.num_logits
        known: list[TokenLogprob] = []
        for begin in range(0, row.num_targets, HEAD_SLICE):
            targets = row.targets[begin : begin + HEAD_SLICE]
            own = hidden[start + begin : start + begin + len(targets)]
            logits = self.model.logits(own)
            found = self._sampler.prompt_logprobs(logits, targets, wanted)
            known += [_logprob(raw) for raw in found]
        return known


def _batch_rows(row: Row) -> list[BatchRow]:
    """Proposed tokens are rows of their own beside the sequence's token: plain decoding."""
    table, slot = row.sequence.block_table, row.adapter
    # The logits of prompt tokens are computed in slices.
    own = BatchRow(row.tokens, row.start, table, 1 if row.choices else 0, slot)
    return [
        own,
        *(BatchRow([token], row.end + i, table, 1, slot) for i, token in enumerate(row.proposed)),
    ]


def _penalty_state(sequence: Sequence, settings: SamplingSettings) -> PenaltyState | None:
    repeats = settings.repetition_penalty != 1.0
    if not (repeats or settings.presence_penalty or settings.frequency_penalty):
        return None
    return PenaltyState(sequence.tokens[: sequence.num_prompt], count_prompt=repeats)


def _banned(settings: SamplingSettings, row: Row, ahead: list[int]) -> list[int]:
    """Ends below ``min_tokens``, and last tokens of bad words whose rest has just been put out."""
    banned: list[int] = []
    sequence = row.sequence
    if row.end - sequence.num_prompt + len(ahead) < settings.min_tokens:
        banned += settings.eos_token_ids
        banned += settings.stop_token_ids
    if settings.bad_words:
        output = sequence.tokens[sequence.num_prompt :] + ahead
        banned += [word[-1] for word in settings.bad_words if _ends_with(output, word[:-1])]
    return banned


def _ends_with(tokens: list[int], ending: tuple[int, ...]) -> bool:
    return not ending or tuple(tokens[-len(ending) :]) == ending


def _result(draws: list[RawDraw], prompt_logprobs: list[TokenLogprob]) -> RowResult:
    """One bad draw ends its sequence, and no other."""
    error = next((draw.error for draw in draws if draw.error is not None), None)
    if error is not None:
        return RowResult(error=str(error), is_refusal=error is DrawError.NOTHING_ALLOWED)
    drawn = [Draw(draw.token, _logprob(draw.logprob) if draw.logprob else None) for draw in draws]
    return RowResult(drawn, prompt_logprobs, is_late=any(draw.is_late for draw in draws))


def _logprob(raw: RawLogprob) -> TokenLogprob:
    top = [max(LEAST_LOGPROB, logprob) for logprob in raw.top_logprobs]
    return TokenLogprob(max(LEAST_LOGPROB, raw.logprob), raw.rank, raw.top_ids, top)
