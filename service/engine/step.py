"""What one step does, and what came of it: the integers between scheduler and runner.

step = scheduler.schedule()          Step | None
result = runner.run(step)            StepResult, rows parallel to step.rows
scheduler.update(step, result)
"""

from __future__ import annotations

from dataclasses import dataclass, field

from service.engine.messages import TokenLogprob
from service.engine.sequence import Choice, Draw, Sequence
from service.redaction import Redacted

__all__ = ["Draw", "Row", "RowResult", "Step", "StepResult", "agreed", "make_row"]

UNKNOWN = 0  # stands for a token that only the device knows


@dataclass(slots=True, repr=False)
class Row(Redacted):
    """Computes ``sequence.tokens[start:start + count]``.

    ``num_logits`` counts the last tokens of the row whose logits are wanted. The first
    ``num_targets`` of those predict prompt tokens whose logprob is asked for (``targets``); the
    last one is sampled once for each of ``choices``, with ``choice.settings``, at position ``end``.
    ``num_pooled`` counts the last tokens of the row whose final states are pooled.
    ``adapter`` is the slot its adapter lies in, if it has one.

    A row launched ahead of the step before it computes the token that row ``token_from`` of that
    step draws: nobody but the device knows it yet.

    A row of one token and one choice may be given ``proposed`` tokens, at most ``num_ahead``: they
    are computed after its own, and a token is drawn after each of them as well. Prompt lookup's are
    there from the start, a draft model's are filled in by the runner.
    """

    sequence: Sequence
    start: int
    count: int
    num_logits: int = 0
    num_targets: int = 0
    num_pooled: int = 0
    choices: tuple[Choice, ...] = ()
    adapter: int | None = None
    num_ahead: int = 0
    proposed: list[int] = field(default_factory=list)
    gives_up: bool = False  # said by the runner: proposals do this sequence no good
    token_from: int | None = None
    is_promise: bool = False  # its sequence goes on from the token it draws
    is_void: bool = False  # it was fed a token that was not the one drawn: nothing came of it

    @property
    def end(self) -> int:
        return self.start + self.count

    @property
    def samples(self) -> bool:
        return bool(self.choices)

    @property
    def tokens(self) -> list[int]:
        if self.token_from is not None:
            return [UNKNOWN]
        return self.sequence.tokens[self.start : self.start + self.count]

    @property
    def targets(self) -> list[int]:
        """Prompt tokens whose logprob the first ``num_targets`` rows of logits give."""
        first = self.start + self.count - self.num_logits + 1
        return self.sequence.tokens[first : first + self.num_targets]

    def depart(self, max_model_len: int) -> None:
        """It is launched: until it is back, its sequence counts what it computes and draws."""
        sequence = self.sequence
        sequence.num_rows += 1
        sequence.num_launched += self.count
        if len(self.choices) == 1 and self.choices is sequence.choices and not self.num_ahead:
            self.is_promise = not sequence.ends_at(self.end + 1, max_model_len)
            sequence.num_promised += self.is_promise

    def arrive(self) -> None:
        """It is back, and what it did is about to be counted."""
        self.sequence.num_rows -= 1
        if not self.is_void:
            self._take_back()

    def void(self) -> None:
        """Its token has to be computed again. It still writes to its page until it is back."""
        self._take_back()
        self.is_void = True

    def _take_back(self) -> None:
        self.sequence.num_launched -= self.count
        self.sequence.num_promised -= self.is_promise


@dataclass(slots=True, repr=False)
class Step(Redacted):
    """Rows of one token come first; among them, and after them, those without an adapter, then
    slot by slot. ``fills`` (slot, version) are adapters to be put there before the forward.

    ``copies`` (source block, target block, first tokens) are done before the forward. Targets are
    distinct and every source holds what is wanted before the step, so in list order or all sources
    read first is the same. ``stores`` (block, host slot, first tokens) are done before them, in
    list order, and ``loads`` (host slot, block, first tokens) after them: a page may be stored and
    then be a target, or the source of a copy and then the target of a load.
    """

    number: int
    rows: list[Row] = field(default_factory=list)
    copies: list[tuple[int, int, int]] = field(default_factory=list)
    fills: list[tuple[int, int]] = field(default_factory=list)
    num_tokens: int = 0
    stores: list[tuple[int, int, int]] = field(default_factory=list)
    loads: list[tuple[int, int, int]] = field(default_factory=list)
    began: float = 0.0  # the scheduler's clock

    def put_in_order(self) -> None:
        self.rows.sort(key=_place)  # stable: otherwise the order of the line


@dataclass(slots=True, repr=False)
class RowResult(Redacted):
    """``draws`` parallel to ``row.choices``, ``prompt_logprobs`` to ``row.targets``.

    Of a row with proposals ``draws`` are those of its one choice that count (``agreed``); none at
    all where the row came to nothing and is to be done again.
    ``error`` ends this row's sequence alone; it is what the client may be told. ``is_late``: the
    token was settled on the host, so a row launched ahead has computed another one.
    """

    draws: list[Draw] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    error: str | None = None
    is_late: bool = False
    is_refusal: bool = False  # the error lies in what the request asks for
    pooled: bytes | None = None  # with the row that ends a prompt whose states are pooled


@dataclass(slots=True, repr=False)
class StepResult(Redacted):
    """``has_run`` is False where nothing is known of what the step did to pages and host slots."""

    rows: list[RowResult]
    draft_passes: list[tuple[int, float]] = field(default_factory=list)  # rows, seconds of each
    has_run: bool = True
    model_seconds: float = 0.0  # of the step inside the network, on the device's clock

    @classmethod
    def failed(cls, step: Step, error: str) -> StepResult:
        """The whole step came to nothing: every sequence in it ends with this error."""
        return cls([RowResult(error=error) for _ in step.rows], has_run=False)


def agreed(proposed: list[int], draws: list[Draw]) -> list[Draw]:
    """Of the draws after a token and after each one proposed, those that are the sequence's next.

    The first always is. Each next one is while the token proposed before it is the one drawn.
    """
    count = 1
    for token, draw in zip(proposed, draws, strict=False):
        if draw.token != token:
            break
        count += 1
    return draws[:count]


def make_row(sequence: Sequence, count: int) -> Row:
    """The next ``count`` tokens of a sequence, and which logits they are computed for."""
    start = sequence.num_scheduled
    end = start + count
    row = Row(sequence, start, count)
    if end == sequence.length:
        row.choices = sequence.choices_that_draw
        row.num_logits = 1 if row.choices else 0
    if sequence.request.lacks_prompt_logprobs:
        _want_prompt_logprobs(row)
    if sequence.request.submit.pooling:
        row.num_pooled = _num_pooled(row)
    return row


def _want_prompt_logprobs(row: Row) -> None:
    """Row i predicts token i + 1: the last row of a chunk knows the first token of the next."""
    first = max(row.start, row.sequence.first_logits)
    if first < row.end:
        row.num_logits = row.end - first
        row.num_targets = min(row.end, row.sequence.num_prompt - 1) - first


def _num_pooled(row: Row) -> int:
    """Of a mean every token that is not in it yet, else the last one alone."""
    request = row.sequence.request
    if request.submit.pooling == "mean":
        return max(0, row.end - max(row.start, request.num_pooled))
    return int(row.end == row.sequence.num_prompt)


def _place(row: Row) -> tuple[bool, int]:
    return row.count > 1, -1 if row.adapter is None else row.adapter
