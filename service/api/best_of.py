"""``best_of``: of the choices that were generated for a prompt, those that are shown."""

from __future__ import annotations

from service.api.submission import Job
from service.api.text import Event


def choose(job: Job, events: list[Event]) -> list[Event]:
    """The best of each prompt's choices, numbered anew; all of them where no more were generated.

    Beams come ranked; of drawn choices the best have the highest mean log-probability a token.
    """
    if job.num_shown == job.n:
        return events
    chosen: list[Event] = []
    for first in range(0, len(events), job.n):
        choices = events[first : first + job.n]
        ranked = choices
        if job.length_penalty is None:
            ranked = sorted(choices, key=mean_logprob, reverse=True)
        shown = ranked[: job.num_shown]
        # What was asked of the prompt came with one choice, perhaps one that is not shown.
        known = next((c.prompt_logprobs for c in choices if c.prompt_logprobs is not None), None)
        shown[0].prompt_logprobs = known
        for event in shown:
            event.index = len(chosen)
            chosen.append(event)
    return chosen


def mean_logprob(event: Event) -> float:
    """Of its generated tokens; an echoed prompt's stand before them."""
    own = event.logprobs[len(event.logprobs) - event.num_tokens :]
    values = [news.logprob.logprob for news in own if news.logprob is not None]
    return sum(values) / len(values) if values else 0.0
