"""Running ahead: a step is launched while the device still computes the one before it.

Its rows that go on from a token which that step draws are fed on the device; the host learns the
token one step later. Whatever of the next row depends on the token itself has to wait for it, and
its step with it. Ends by length are known in advance; a sequence that turns out to have ended
otherwise leaves one row behind, whose draw is discarded.
"""

from __future__ import annotations

from service.engine.messages import SamplingSettings
from service.engine.sequence import Sequence, Status
from service.engine.step import Row, Step


def may_run_ahead(row: Row) -> bool:
    """Whether the row after this one can be made before the host knows what this one gave."""
    sequence = row.sequence
    if sequence.status is Status.FINISHED:
        return True
    if sequence.request.lacks_prompt_logprobs:
        return False  # where the next chunk's logits begin is known when this one's have come
    if row.num_ahead:
        return False  # how many tokens it gives is known when it is back
    if not row.choices:
        return True  # in the middle of a prompt, or its end and no token is asked for
    if len(row.choices) > 1 or len(sequence.choices) > 1:
        return False  # the choices part with this draw
    reads = sequence.grammar is not None or reads_output(sequence.settings)
    return not row.is_promise or not reads


def reads_output(settings: SamplingSettings) -> bool:
    """Whether the last token drawn changes how the next one is."""
    return bool(
        settings.bad_words
        or settings.repetition_penalty != 1.0
        or settings.presence_penalty
        or settings.frequency_penalty
    )


def feed(step: Step, before: Step) -> None:
    """Tells rows of a token not yet known which row of the step before them draws it."""
    drawing: dict[Sequence, int] = {
        row.sequence: place for place, row in enumerate(before.rows) if row.is_promise
    }
    for row in step.rows:
        if row.start == len(row.sequence.tokens):
            row.token_from = drawing[row.sequence]
