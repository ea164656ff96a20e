"""Which tokens are guessed ahead, and how many of them pay: speculation in integers.

A decoding sequence's row may carry proposed tokens after its last one. The step then draws the
model's own token at each of these places, with that place's own uniform, and the proposals that
equal what was drawn are kept, with the draw after them. So the text is the one that would have been
generated without: a wrong guess costs rows of a step, never a token.

What a guess costs is learned from the steps (``StepCosts``), what it brings from how many of the
sequence's guesses were right (``Acceptance``). Each step takes the proposals that promise the most
tokens a second of all sequences together, which is none where rows are expensive or guesses poor.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence as Collection
from dataclasses import dataclass
from typing import NamedTuple

from service.engine.costs import StepCosts
from service.engine.counters import Counters
from service.engine.lookup import PromptLookup
from service.engine.paging import Paging
from service.engine.sequence import Sequence
from service.engine.step import Row, Step
from service.redaction import redacted

NONE, NGRAM, DRAFT = "none", "ngram", "draft"
BELIEF, DOUBT = 0.7, 2.0  # of one who was never tried: rate of acceptance, in so many trials
MEMORY = 0.8  # of earlier steps when a step has told
RECOVERY = 0.02  # of the way back to the first belief with every step that tried nothing
WORTHWHILE = 1.1  # tokens a second against those without any guess


@dataclass(frozen=True)
class SpeculationLimits:
    most: int = 0  # proposed tokens of one sequence in a step; 0 is off
    most_in_step: int = 0  # of all sequences
    has_draft: bool = False  # a draft model is loaded
    shortest: int = 2  # tokens that prompt lookup compares
    longest: int = 4


class Acceptance:
    """How likely a proposed token is right, by the latest trials of one sequence."""

    __slots__ = ("_right", "_tried")

    def __init__(self) -> None:
        self._right, self._tried = BELIEF * DOUBT, DOUBT

    @property
    def rate(self) -> float:
        return self._right / self._tried

    def note(self, proposed: int, accepted: int) -> None:
        """Past the first wrong token none had a chance to be right."""
        self._right = self._right * MEMORY + accepted
        self._tried = self._tried * MEMORY + accepted + (accepted < proposed)

    def recover(self) -> None:
        """Nothing was tried: in time it is worth trying again."""
        self._right += RECOVERY * (BELIEF * DOUBT - self._right)
        self._tried += RECOVERY * (DOUBT - self._tried)


class Speculation:
    """What is known of guessing ahead in one sequence."""

    __slots__ = ("acceptance", "lookup", "most")

    def __init__(self, most: int, lookup: PromptLookup | None) -> None:
        self.most = most
        self.lookup = lookup  # None: a draft model proposes
        self.acceptance = Acceptance()


class Wish(NamedTuple):
    """A row that could take proposals."""

    row: Row
    speculation: Speculation
    most: int
    tokens: list[int]  # proposed already by prompt lookup; the draft model's come in the step

    def __repr__(self) -> str:
        return redacted(self)


class Speculator:
    def __init__(
        self,
        limits: SpeculationLimits,
        counters: Counters,
        costs: StepCosts | None = None,
        draft_costs: StepCosts | None = None,
    ) -> None:
        self._limits = limits
        self._counters = counters
        self.costs = costs or StepCosts()
        self.draft_costs = draft_costs or StepCosts()

    # ---- before the step

    def extend(self, step: Step, room: int, max_model_len: int, paging: Paging) -> None:
        """Gives rows of a finished step proposals: at most ``room`` tokens, pages nobody needs.

        Only where all rows decode: a step with prompts is bound by computing as it is.
        """
        room = min(room, self._limits.most_in_step)
        num_rows = len(step.rows)
        if room <= 0 or not self._may_pay(num_rows, room, rate=1.0):
            return
        if not all(map(_decodes, step.rows)):
            return
        able = self._able(step.rows, max_model_len)
        if not able:
            return
        chosen = self._choose(able, num_rows, room)
        self._give(step, chosen, paging)

    def may_guess_after(self, step: Step) -> bool:
        """Whether the step after this one might carry proposals: it has to know its tokens."""
        most = self._limits.most_in_step
        return (
            most > 0
            and any(self._guesses(row.sequence) for row in step.rows if len(row.choices) == 1)
            and self._may_pay(len(step.rows), most, rate=1.0)
        )

    def _guesses(self, sequence: Sequence) -> bool:
        speculation = sequence.speculation or self._start(sequence)
        return speculation is not None and speculation.most > 0

    def _able(self, rows: list[Row], max_model_len: int) -> list[Wish]:
        wishes = []
        for row in rows:
            sequence = row.sequence
            speculation = sequence.speculation or self._start(sequence)
            if speculation is not None:
                most = min(
                    speculation.most,
                    # One token is drawn beyond the proposed ones.
                    sequence.settings.max_tokens - sequence.num_output - 1,
                    max_model_len - len(sequence.tokens) - 1,
                )
                if most > 0:
                    wishes.append(Wish(row, speculation, most, []))
        return wishes

    def _start(self, sequence: Sequence) -> Speculation | None:
        settings, limits = sequence.settings, self._limits
        method = settings.speculative_method
        most = min(settings.num_speculative_tokens, limits.most)
        if sequence.grammar is not None:
            return None  # its masks follow what was said, one token at a time
        if most <= 0 or not (method == NGRAM or (method == DRAFT and limits.has_draft)):
            return None
        lookup = PromptLookup(limits.shortest, limits.longest) if method == NGRAM else None
        sequence.speculation = Speculation(most, lookup)
        return sequence.speculation

    def _choose(self, able: list[Wish], num_rows: int, room: int) -> list[tuple[Wish, int]]:
        most = min(room, sum(wish.most for wish in able))
        best = max(wish.speculation.acceptance.rate for wish in able)
        if not self._may_pay(num_rows, most, best):
            counts = [0] * len(able)
        else:
            able = [wish for wish in map(_looked_up, able) if wish is not None]
            counts = self._best_counts(able, num_rows, room)
        for wish, count in zip(able, counts, strict=True):
            if not count:
                wish.speculation.acceptance.recover()
        return [pair for pair in zip(able, counts, strict=True) if pair[1]]

    def _may_pay(self, num_rows: int, most: int, rate: float) -> bool:
        """Whether any number of proposals would, were each right at this rate; spares the rest."""
        # Seconds a token without guesses, less what has to be gained.
        alone = self.costs.seconds(num_rows) / (num_rows * WORTHWHILE)
        sizes = {1 << power for power in range(most.bit_length())} | {most}
        return any(
            self.costs.seconds(num_rows + size) < alone * (num_rows + rate * size) for size in sizes
        )

    def _best_counts(self, able: list[Wish], num_rows: int, room: int) -> list[int]:
        """How many proposals each gets: of all numbers of the likeliest ones the one that gives
        the most tokens a second, if that is noticeably more than without."""
        likeliest = sorted(
            (
                (wish.speculation.acceptance.rate**depth, depth, i)
                for i, wish in enumerate(able)
                for depth in range(1, wish.most + 1)
            ),
            key=lambda entry: (-entry[0], entry[1]),
        )[:room]
        best_pace, best_size = WORTHWHILE * num_rows / self.costs.seconds(num_rows), 0
        tokens, draft_seconds = float(num_rows), 0.0
        passes: dict[int, int] = defaultdict(int)  # rows of each pass of the draft model
        for size, (gain, depth, i) in enumerate(likeliest, 1):
            tokens += gain
            if able[i].speculation.lookup is None:
                draft_seconds += self._one_more(passes[depth])
                passes[depth] += 1
            pace = tokens / (self.costs.seconds(num_rows + size) + draft_seconds)
            if pace > best_pace:
                best_pace, best_size = pace, size
        counts = [0] * len(able)
        for _, _, i in likeliest[:best_size]:
            counts[i] += 1
        return counts

    def _one_more(self, rows: int) -> float:
        """Seconds that one row more costs a pass of the draft model."""
        if not self.draft_costs.is_known:
            return 0.0
        before = self.draft_costs.seconds(rows) if rows else 0.0
        return self.draft_costs.seconds(rows + 1) - before

    def _give(self, step: Step, chosen: list[tuple[Wish, int]], paging: Paging) -> None:
        for wish, wanted in chosen:
            row = wish.row
            count = paging.reach_ahead(row.sequence, wanted)
            row.num_ahead = count
            row.proposed = wish.tokens[:count]
            step.num_tokens += count

    # ---- after it

    def note(self, row: Row, num_accepted: int) -> None:
        """What came of a row's proposals."""
        speculation, num_proposed = row.sequence.speculation, len(row.proposed)
        assert speculation is not None, "proposed for one who wants none"
        speculation.acceptance.note(num_proposed, num_accepted)
        self._counters.spec_drafts += 1
        self._counters.spec_draft_tokens += num_proposed
        self._counters.spec_accepted_tokens += num_accepted

    def give_up(self, sequence: Sequence) -> None:
        """Its proposals make numbers that are none: it goes on without."""
        if sequence.speculation is not None:
            sequence.speculation.most = 0

    def observe(
        self, step: Step, seconds: float, draft_passes: Collection[tuple[int, float]]
    ) -> None:
        """``draft_passes``: (rows, seconds) of each pass the draft model took within the step."""
        for rows, own in draft_passes:
            self.draft_costs.observe(rows, own)
        if all(map(_decodes, step.rows)):
            rows = sum(1 + len(row.proposed) for row in step.rows)
            self.costs.observe(rows, seconds - sum(own for _, own in draft_passes))


def _decodes(row: Row) -> bool:
    """One token whose successor is drawn for one choice, and nothing else is asked of the row."""
    return (
        row.count == 1
        and len(row.choices) == 1
        and row.num_targets == 0
        and len(row.sequence.tokens) > row.sequence.num_prompt
    )


def _looked_up(wish: Wish) -> Wish | None:
    """With the tokens that prompt lookup finds; None where it finds none."""
    lookup = wish.speculation.lookup
    if lookup is None:
        return wish
    tokens = lookup.propose(wish.row.sequence.tokens, wish.most)
    return wish._replace(tokens=tokens) if tokens else None
