"""The one event stream: engine outputs become text, stop strings are found, events come out.

Whole answers are this stream, joined. Entering ``generate`` is admission (it raises before any byte
is sent), leaving it frees whatever the engine still holds.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager

from model.detokenizer import Detokenizer
from service.api.schemas.answers import Usage, usage
from service.api.submission import Arrival, Job, Prompt, admitted, outputs
from service.api.text import ChoiceText, Event, StopStrings, TokenNews
from service.engine.messages import REFUSED, Output
from service.errors import EngineFailure, GrammarRefused, InvalidRequest
from service.metrics import ChoiceTimes, EngineMetrics, Metrics
from service.registry import Generation

logger = logging.getLogger("pronk.api")


@asynccontextmanager
async def generate(job: Job, metrics: Metrics) -> AsyncIterator[Answer]:
    """Submit every prompt, or none: raises the engine's refusal of any of them."""
    async with admitted(job) as generations:
        answer = Answer(job, generations, metrics.of(job.model, job.engine))
        try:
            yield answer
        except Exception:
            answer.close("error")
            raise
        finally:
            answer.close("cancelled")


class Answer:
    """The events of one job, over all its prompts and choices, and their exact usage."""

    def __init__(self, job: Job, first: list[Generation], metrics: EngineMetrics) -> None:
        self.job = job
        self.num_cached = 0
        self.num_accepted = 0  # of the tokens guessed ahead
        self.num_rejected = 0
        self._first = first
        self._metrics = metrics
        self._num_finished = 0  # prompts
        self._num_told = 0  # tokens, in events
        self._open = {number: self._prompt_text(number) for number in range(len(first))}

    async def events(self) -> AsyncGenerator[Event, None]:
        """Ends when every choice has its finish reason; raises ``PronkError`` when one cannot."""
        async with aclosing(outputs(self.job, self._first)) as arrivals:
            async for arrival in arrivals:
                if event := self._take(arrival):
                    self._num_told += event.num_tokens
                    yield event
        if self._num_finished < len(self.job.prompts):
            raise EngineFailure("The engine ended before the answer did; try again.")

    def _take(self, arrival: Arrival) -> Event | None:
        """The event of an output; None for a choice that has ended already."""
        number, generation, output = arrival
        self.num_cached += output.cached_tokens or 0
        prompt = self._open.get(number)
        if prompt is None:
            prompt = self._open[number] = self._prompt_text(number)
        event = prompt.take(output)
        if event is not None and output.num_accepted + output.num_rejected:
            # Those past a stop string were guessed in vain too.
            accepted = min(output.num_accepted, event.num_tokens)
            self.num_accepted += accepted
            self.num_rejected += output.num_rejected + output.num_accepted - accepted
        if event is not None and event.finish_reason is not None:
            self.job.meter.end_choice(event.index, event.finish_reason, event.stop_reason)
            if output.finish_reason is None:
                generation.stop(output.choice)
            self._num_finished += prompt.is_finished
        return event

    def _prompt_text(self, number: int) -> _PromptText:
        return _PromptText(self.job, self.job.prompts[number], number * self.job.n, self._metrics)

    async def joined(self) -> list[Event]:
        """The whole answer: one event a choice, in the order of their indices."""
        whole: dict[int, Event] = {}
        async with aclosing(self.events()) as events:
            async for event in events:
                if event.index in whole:
                    whole[event.index].extend(event)
                else:
                    whole[event.index] = event
        return [whole[index] for index in sorted(whole)]

    def usage(self, num_generated: int) -> Usage:
        return usage(
            self.job.num_prompt_tokens,
            num_generated,
            self.num_cached,
            self.num_accepted,
            self.num_rejected,
        )

    def abandon(self) -> None:
        """All of it is asked for anew: what has come is told to nobody."""
        self._metrics.num_dropped += self._num_told
        for prompt in self._open.values():
            prompt.abandon()

    def close(self, reason: str) -> None:
        """Whatever has not ended yet ended like this."""
        meter = self.job.meter
        meter.num_accepted, meter.num_rejected = self.num_accepted, self.num_rejected
        for prompt in self._open.values():
            prompt.close(reason)


class _PromptText:
    """One prompt's choices as they grow, with the echo of the prompt before each."""

    def __init__(self, job: Job, prompt: Prompt, first: int, metrics: EngineMetrics) -> None:
        self._job = job
        self._prompt = prompt
        self._metrics = metrics
        self._logprobs: list[TokenNews] = []  # the echoed prompt's
        self._has_started = False
        self._choices = [
            ChoiceText(
                first + number,
                settings,
                self._detokenizer(prompt.ids),
                StopStrings(job.text.stop, job.text.include_stop),
                include_stop=job.text.include_stop,
                offset=len(prompt.echo),
            )
            for number, settings in enumerate(prompt.settings)
        ]
        self._times = [ChoiceTimes(metrics, job.arrival, len(prompt.ids)) for _ in self._choices]
        self._content: dict[int, list[str]] = {}  # kept only where content is logged

    @property
    def is_finished(self) -> bool:
        return all(choice.is_finished for choice in self._choices)

    def take(self, output: Output) -> Event | None:
        """The event of ``output``; None for a choice that has ended already."""
        if output.finish_reason == "error" and output.stop_reason == REFUSED:
            raise self._refusal(output.error or "The engine refused this request.")
        if output.finish_reason == "error":
            raise EngineFailure(output.error or "The engine failed on this request.")
        if output.finish_reason == "cancelled":
            raise EngineFailure("The engine gave this request up; try again.")
        choice, times = self._choices[output.choice], self._times[output.choice]
        if choice.is_finished:
            return None
        times.note(output)
        if not self._has_started:
            self._start(output)
        event = self._push(choice, output)
        self._metrics.num_dropped += len(output.tokens) - event.num_tokens
        if event.finish_reason is not None:
            times.close(event.finish_reason)
        if self._job.log_content:
            self._log(event)
        return event

    def _refusal(self, reason: str) -> InvalidRequest:
        """What was asked for turned out to be impossible."""
        field = self._job.grammar_param
        if not self._job.grammar:
            return InvalidRequest(reason[:1].upper() + reason[1:])
        return GrammarRefused(f"{field or 'The grammar'}: {reason}", param=field)

    def _start(self, output: Output) -> None:
        """What comes once, with a prompt's first output."""
        self._has_started = True
        if output.prompt_logprobs is not None and self._job.text.echo_logprobs:
            self._logprobs = self._prompt_news(output)

    def _push(self, choice: ChoiceText, output: Output) -> Event:
        event = choice.push(output)
        event.prompt_logprobs, event.pooled = output.prompt_logprobs, output.pooled
        if event.is_first:
            if self._prompt.echo:
                event.pieces.insert(0, self._prompt.echo)
            event.logprobs[:0] = self._logprobs
        return event

    def _prompt_news(self, output: Output) -> list[TokenNews]:
        assert output.prompt_logprobs is not None
        news = zip(self._prompt.ids, output.prompt_logprobs, self._prompt_offsets(), strict=True)
        return [TokenNews(*item) for item in news]

    def _prompt_offsets(self) -> list[int]:
        """Where each token's text begins in the echo: a client's own text shows the special tokens
        it spells, and none that were put before it."""
        skips = self._job.text.skip_special_tokens
        offsets, length = self._offsets(skips)
        if length != len(self._prompt.echo) and skips:
            offsets, length = self._offsets(False)
        before = max(0, length - len(self._prompt.echo))
        return [max(0, offset - before) for offset in offsets]

    def _offsets(self, skip_special_tokens: bool) -> tuple[list[int], int]:
        """Where each token of the prompt begins in its text, and how long that is."""
        detokenizer, length, offsets = self._detokenizer((), skip_special_tokens), 0, []
        for token in self._prompt.ids:
            offsets.append(length)
            length += len(detokenizer.push(token))
        return offsets, length

    def _detokenizer(
        self, prompt_ids: Sequence[int], skip_special_tokens: bool | None = None
    ) -> Detokenizer:
        skips = self._job.text.skip_special_tokens
        return Detokenizer(
            self._job.tokenizer,
            prompt_ids=prompt_ids,
            skip_special_tokens=skips if skip_special_tokens is None else skip_special_tokens,
            spaces_between_special_tokens=self._job.text.spaces_between_special_tokens,
            shown_special=self._job.text.shown_special,
        )

    def _log(self, event: Event) -> None:
        """Only under ``--log-content``, which warns loudly at the start."""
        pieces = self._content.setdefault(event.index, [])
        pieces += event.pieces
        if event.finish_reason is not None:
            prompt = self._job.tokenizer.decode(self._prompt.ids, skip_special_tokens=False)
            text = "".join(pieces)
            extra = {"request": self._job.request_id, "prompt": prompt, "answer": text}
            logger.info("choice %d ended: %s", event.index, event.finish_reason, extra=extra)

    def abandon(self) -> None:
        for times in self._times:
            times.abandon()

    def close(self, reason: str) -> None:
        for times in self._times:
            times.close(reason)
