"""Beam search over an engine that draws: rounds of one token for every beam, over its prefix cache.

As vLLM has it: each beam offers its likeliest tokens, twice as many as there are beams; those that
end a text make it an answer, of the others the likeliest texts go on. Answers are ranked by their
log-probability over length ** length_penalty, where the length is that of prompt and answer without
the token that ended it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from msgspec.structs import replace

from service.engine.messages import DEADLINE, Output, SamplingSettings, TokenLogprob
from service.errors import EngineFailure, Overloaded
from service.redaction import Redacted

if TYPE_CHECKING:
    from service.registry import Generation

MAX_PATIENCE = 5.0  # seconds between two tries of a beam that met a full queue

# A prompt's ids, how they go on, and whether it is the first round: what is asked of the prompt
# itself is asked then.
Submit = Callable[
    [list[int], list[SamplingSettings], bool], "AbstractAsyncContextManager[Generation]"
]


@dataclass(slots=True, repr=False)
class Beam(Redacted):
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    cumulative: float = 0.0
    has_ended: bool = False  # by its last token
    stop_reason: int | str | None = None

    def extended(self, token: int, logprob: TokenLogprob) -> Beam:
        return Beam(
            [*self.tokens, token],
            [*self.logprobs, logprob],
            self.cumulative + logprob.logprob,
        )


class BeamSearch:
    """One prompt's search, without anything that waits: beams in, beams out."""

    def __init__(self, num_prompt: int, settings: list[SamplingSettings], penalty: float) -> None:
        self.live = [Beam()]
        self.ended: list[Beam] = []
        self.width = len(settings)
        self._settings = settings[0]
        self._num_prompt = num_prompt
        self._penalty = penalty
        self._num_offered = 2 * self.width
        if self._settings.min_tokens:  # so many may be tokens that do not count yet
            self._num_offered += len(self._settings.eos_token_ids)
            self._num_offered += len(self._settings.stop_token_ids)

    @property
    def question(self) -> SamplingSettings:
        """How a beam asks for its likeliest tokens."""
        return SamplingSettings(max_tokens=1, temperature=0.0, logprobs=self._num_offered)

    def advance(self, answers: list[TokenLogprob]) -> None:
        """``answers`` are parallel to ``live``: what each was offered."""
        going: list[Beam] = []
        for beam, offered in zip(self.live, answers, strict=True):
            pairs = zip(offered.top_ids, offered.top_logprobs, strict=True)
            for rank, (token, value) in enumerate(pairs, start=1):
                logprob = TokenLogprob(value, rank, offered.top_ids, offered.top_logprobs)
                grown = beam.extended(token, logprob)
                if not self._ends(token):
                    going.append(grown)
                elif len(beam.tokens) >= self._settings.min_tokens:
                    self._end(grown, token)
        going.sort(key=lambda beam: beam.cumulative, reverse=True)
        self.live = going[: self.width]

    def _ends(self, token: int) -> bool:
        return token in self._settings.eos_token_ids or token in self._settings.stop_token_ids

    def _end(self, beam: Beam, token: int) -> None:
        beam.has_ended = True
        beam.stop_reason = None if token in self._settings.eos_token_ids else token
        self.ended.append(beam)

    @property
    def is_over(self) -> bool:
        """Nobody goes on, or nobody who does can still come among the best."""
        if not self.live or len(self.live[0].tokens) >= self._settings.max_tokens:
            return True
        if len(self.ended) < self.width:
            return False
        least = sorted(map(self.score, self.ended), reverse=True)[self.width - 1]
        return all(self._best_future(beam) <= least for beam in self.live)

    def _best_future(self, beam: Beam) -> float:
        """No token adds to its log-probability; how it may be divided depends on the penalty."""
        longest = self._num_prompt + self._settings.max_tokens
        length = longest if self._penalty > 0 else self._num_prompt + len(beam.tokens)
        return float(beam.cumulative / length**self._penalty)

    def score(self, beam: Beam) -> float:
        length = self._num_prompt + len(beam.tokens) - beam.has_ended
        return float(beam.cumulative / length**self._penalty)

    def best(self) -> list[Beam]:
        """As many as were asked for, the best first."""
        return sorted([*self.ended, *self.live], key=self.score, reverse=True)[: self.width]


@asynccontextmanager
async def search_beams(
    ids: list[int],
    settings: list[SamplingSettings],
    penalty: float,
    submit: Submit,
    give_up: float | None = None,
) -> AsyncIterator[Generation]:
    """One beam for each of ``settings``, as far as they are at ``give_up`` (time.monotonic()).

    Entering raises the engine's refusal of the prompt.
    """
    search = BeamSearch(len(ids), settings, penalty)
    async with (
        submit(ids, [search.question], True) as first,
        aclosing(_run(search, ids, first, submit, give_up)) as outputs,
    ):
        yield _FoundBeams(outputs)


class _FoundBeams:
    """The beams as a generation's outputs: each comes whole, once the search is over."""

    def __init__(self, outputs: AsyncGenerator[Output, None]) -> None:
        self._outputs = outputs

    def __aiter__(self) -> AsyncIterator[Output]:
        return self._outputs

    def stop(self, choice: int) -> None:
        """Nothing to spare: it has ended already."""


async def _run(
    search: BeamSearch,
    ids: list[int],
    first: Generation,
    submit: Submit,
    give_up: float | None,
) -> AsyncGenerator[Output, None]:
    opening = await _only_output(first)
    answers, is_late = [opening], opening.finish_reason == "length" and not opening.tokens
    while not is_late:
        search.advance([_offered(answer) for answer in answers])
        if search.is_over:
            break
        if give_up is not None and time.monotonic() >= give_up:
            is_late = True
            break
        answers = await _ask_all(search, ids, submit)
        is_late = any(not answer.tokens for answer in answers)
    num_beams = 0
    for choice, beam in enumerate(search.best()):
        output = _as_output(choice, beam, is_late=is_late)
        if not choice:
            output = replace(
                output,
                cached_tokens=opening.cached_tokens,
                prompt_logprobs=opening.prompt_logprobs,
                queue_time=opening.queue_time,
                prefill_time=opening.prefill_time,
            )
        yield output
        num_beams += 1
    for choice in range(num_beams, search.width):  # out of time before there were as many
        yield _as_output(choice, Beam(), is_late=True)


def _as_output(choice: int, beam: Beam, *, is_late: bool) -> Output:
    reason, stop_reason = ("stop", beam.stop_reason) if beam.has_ended else ("length", None)
    if is_late and not beam.has_ended:
        stop_reason = DEADLINE
    return Output(0, choice, beam.tokens, beam.logprobs or None, reason, stop_reason)


async def _only_output(generation: Generation) -> Output:
    async for output in generation:
        if output.finish_reason in ("error", "cancelled"):
            raise EngineFailure(output.error or "The engine failed on this request.")
        return output
    raise EngineFailure("The engine ended before the answer did; try again.")


def _offered(output: Output) -> TokenLogprob:
    assert output.logprobs, "asked for"
    return output.logprobs[0]


async def _ask_all(search: BeamSearch, ids: list[int], submit: Submit) -> list[Output]:
    """Every live beam's next tokens, asked for together so that they share a batch."""
    tasks = [
        asyncio.create_task(_ask([*ids, *beam.tokens], search.question, submit))
        for beam in search.live
    ]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _ask(ids: list[int], question: SamplingSettings, submit: Submit) -> Output:
    """The request was accepted: a full queue only means to wait."""
    while True:
        try:
            async with submit(ids, [question], False) as generation:
                return await _only_output(generation)
        except Overloaded as error:
            await asyncio.sleep(min(error.retry_after or 1.0, MAX_PATIENCE))
