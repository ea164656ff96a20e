"""Rows that follow a grammar: what each may say next, and when it has said all.

A choice's state is as far as its sequence's text; it is kept from step to step, survives
preemption and is made anew where it was not kept. Masks are begun before the forward and waited
for after it. While they are filled nobody else touches the states.
"""

from __future__ import annotations

from model.grammar import GrammarError, GrammarState
from model.grammar_masks import MaskFiller, Masks, Words, has_bit, set_bits
from model.sampling_row import SamplingRow
from service.engine.sequence import NO_TOKEN, Choice, Draw, Sequence, Status
from service.engine.step import Row, RowResult, Step

NOT_ALLOWED = "allowed_token_ids has none of the tokens that may come next"
DEAD_END = "this model's tokens cannot spell what the grammar asks for next"
Key = tuple[int, int]  # request, choice


class StepMasks:
    """Of one step; ``complete`` and ``failed`` tell of choices whose draw does not count."""

    def __init__(self) -> None:
        self.keys: list[Key] = []
        self.states: list[GrammarState] = []
        self.filling: Masks | None = None
        self.complete: set[Key] = set()
        self.failed: dict[Key, str] = {}


class ConstrainedRows:
    def __init__(self) -> None:
        self._filler: MaskFiller | None = None  # threads, once somebody needs them
        self._states: dict[Key, tuple[Sequence, GrammarState]] = {}

    def __len__(self) -> int:
        return len(self._states)

    def start(self, step: Step) -> StepMasks | None:
        """Begins the masks of the tokens that ``step`` draws; None where no row needs one."""
        rows = [row for row in step.rows if row.choices and row.sequence.grammar is not None]
        if not rows:
            return None
        masks = StepMasks()
        for row in rows:
            for choice in row.choices:
                self._add(masks, row.sequence, choice)
        if masks.states:
            grammar = rows[0].sequence.grammar
            assert grammar is not None
            if self._filler is None:
                self._filler = MaskFiller()
            masks.filling = self._filler.start(masks.states, grammar.vocabulary.num_words)
        return masks

    def _add(self, masks: StepMasks, sequence: Sequence, choice: Choice) -> None:
        key = _key(sequence, choice)
        try:
            state = self._state(sequence, choice)
        except GrammarError as error:
            masks.failed[key] = str(error)
            return
        masks.keys.append(key)
        masks.states.append(state)

    def _state(self, sequence: Sequence, choice: Choice) -> GrammarState:
        """As far as the sequence's text."""
        assert sequence.grammar is not None
        key = _key(sequence, choice)
        _, state = self._states.get(key, (None, None))
        if state is None:
            state = sequence.grammar.start(sequence.tokens[: sequence.num_prompt])
        self._states[key] = (sequence, state)
        state.take(sequence.tokens[sequence.num_prompt + state.num_taken :])
        return state

    def restrict(self, masks: StepMasks, step: Step, sampling: list[SamplingRow]) -> None:
        """Waits for the masks and puts them on the rows they are for, parallel to the draws."""
        if masks.filling is None:
            return
        words = masks.filling.wait()
        places = {key: place for place, key in enumerate(masks.keys)}
        drawn = 0
        for row in step.rows:
            for choice in row.choices:
                place = places.get(_key(row.sequence, choice))
                if row.sequence.grammar is not None and place is not None:
                    state = masks.states[place]
                    self._restrict(masks, row, choice, state, words[place], sampling[drawn])
                drawn += 1 + len(row.proposed)

    def _restrict(
        self,
        masks: StepMasks,
        row: Row,
        choice: Choice,
        state: GrammarState,
        mask: Words,
        drawn: SamplingRow,
    ) -> None:
        key, settings = _key(row.sequence, choice), choice.settings
        assert row.sequence.grammar is not None
        end = row.sequence.grammar.vocabulary.end
        try:
            state.check()
        except GrammarError as error:
            masks.failed[key] = str(error)
            return
        set_bits(mask, [end, *settings.eos_token_ids], False)
        if not mask.any():
            if state.may_end:
                masks.complete.add(key)
            else:
                masks.failed[key] = DEAD_END
            return
        if state.may_end:
            set_bits(mask, [*settings.eos_token_ids, *settings.stop_token_ids], True)
        if settings.allowed_token_ids is not None and not has_bit(mask, settings.allowed_token_ids):
            masks.failed[key] = NOT_ALLOWED
            return
        if drawn.banned:
            kept = mask.copy()
            set_bits(kept, drawn.banned, False)
            if not kept.any():
                drawn.banned = ()  # valid comes before min_tokens and bad_words
        drawn.mask = mask

    def follow(self, masks: StepMasks, row: Row, result: RowResult) -> RowResult:
        """What a row's draws come to: whether they complete their texts, or have gone wrong."""
        if row.sequence.grammar is None or not row.choices:
            return result
        keys = [_key(row.sequence, choice) for choice in row.choices]
        failed = next((masks.failed[key] for key in keys if key in masks.failed), None)
        if failed is not None:
            return RowResult(error=failed, is_refusal=True)
        if result.error is not None:
            return result
        try:
            for place, (key, choice) in enumerate(zip(keys, row.choices, strict=True)):
                if key in masks.complete:
                    result.draws[place] = Draw(NO_TOKEN, completes=True)
                else:
                    result.draws[place] = self._take(key, choice, result.draws[place])
        except GrammarError as error:
            return RowResult(error=str(error), is_refusal=True)
        return result

    def _take(self, key: Key, choice: Choice, draw: Draw) -> Draw:
        """The draw, having gone on with it; an end completes the text, below min_tokens too."""
        state, settings = self._states[key][1], choice.settings
        if draw.token in settings.eos_token_ids:
            return draw._replace(completes=True)
        if draw.token in settings.stop_token_ids and not state.can_take(draw.token):
            return draw._replace(completes=True)
        state.take([draw.token])
        return draw._replace(completes=state.is_complete)

    def forget(self, step: Step) -> None:
        """Its draws may have been taken here and nowhere else."""
        for row in step.rows:
            for choice in row.choices:
                self._states.pop(_key(row.sequence, choice), None)

    def forget_finished(self) -> None:
        gone = [key for key, (owner, _) in self._states.items() if owner.status is Status.FINISHED]
        for key in gone:
            del self._states[key]


def _key(sequence: Sequence, choice: Choice) -> Key:
    return sequence.request.number, choice.index
