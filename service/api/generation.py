"""The one event stream: engine outputs become text, stop strings are found, events come out.

Whole answers are this stream, joined. Entering ``generate`` is admission (it raises before any byte
is sent), leaving it frees whatever the engine still holds.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from model.detokenizer import Detokenizer
from service.api.schemas.answers import Usage, usage
from service.api.text import ChoiceText, Event, StopStrings, TokenNews
from service.engine.messages import Output, SamplingSettings
from service.errors import EngineFailure
from service.metrics import ChoiceTimes, EngineMetrics, Metrics
from service.registry import Engine, Generation, ServedModel

if TYPE_CHECKING:
    from model.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Prompt:
    """``echo`` is the text that opens each choice's answer: the prompt's, or nothing."""

    ids: list[int]
    settings: list[SamplingSettings]  # one a choice
    echo: str = ""


@dataclass(frozen=True, slots=True)
class TextOptions:
    stop: Sequence[str] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    echo_logprobs: bool = False  # the prompt's tokens stand before the answer's in logprobs


@dataclass(frozen=True, slots=True)
class Job:
    """One HTTP request, ready for the engine: validated, templated, tokenized."""

    model: ServedModel
    engine: Engine
    prompts: list[Prompt]
    text: TextOptions = field(default_factory=TextOptions)
    namespace: bytes = b""
    account: str = ""
    priority: int = 0
    deadline: float | None = None  # seconds
    max_queue: float | None = None
    prompt_logprobs: int | None = None
    request_id: str = ""
    arrival: float = 0.0  # time.monotonic()

    @property
    def tokenizer(self) -> Tokenizer:
        assert self.model.tokenizer is not None, "only loaded models get jobs"
        return self.model.tokenizer

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(prompt.ids) for prompt in self.prompts)


@asynccontextmanager
async def generate(job: Job, metrics: Metrics) -> AsyncIterator[Answer]:
    """Submit every prompt, or none: raises the engine's refusal of any of them."""
    async with AsyncExitStack() as stack:
        generations = await _admit(job, stack)
        answer = Answer(job, generations, metrics.of(job.model, job.engine))
        try:
            yield answer
        except Exception:
            answer.close("error")
            raise
        finally:
            answer.close("cancelled")


async def _admit(job: Job, stack: AsyncExitStack) -> list[Generation]:
    admissions = [
        stack.enter_async_context(
            job.engine.submit(
                prompt.ids,
                prompt.settings,
                namespace=job.namespace,
                account=job.account,
                priority=job.priority,
                deadline=job.deadline,
                max_queue=job.max_queue,
                prompt_logprobs=job.prompt_logprobs,
                request_id=job.request_id,
            )
        )
        for prompt in job.prompts
    ]
    if len(admissions) == 1:
        return [await admissions[0]]
    admitted = await asyncio.gather(*admissions, return_exceptions=True)
    for refusal in admitted:
        if isinstance(refusal, BaseException):
            raise refusal
    return [generation for generation in admitted if not isinstance(generation, BaseException)]


class Answer:
    """The events of one job, over all its prompts and choices, and their exact usage."""

    def __init__(self, job: Job, generations: Sequence[Generation], metrics: EngineMetrics) -> None:
        self.job = job
        self.num_cached = 0
        self._generations = generations
        self._metrics = metrics
        self._prompts = [
            _PromptText(job, prompt, first, metrics)
            for prompt, first in zip(job.prompts, _first_indices(job.prompts), strict=True)
        ]

    async def events(self) -> AsyncGenerator[Event, None]:
        """Ends when every choice has its finish reason; raises ``PronkError`` when one cannot."""
        async with aclosing(_merged(self._generations)) as outputs:
            async for number, output in outputs:
                if event := self._take(self._prompts[number], self._generations[number], output):
                    yield event
        if not all(prompt.is_finished for prompt in self._prompts):
            raise EngineFailure("The engine ended before the answer did; try again.")

    def _take(self, prompt: _PromptText, generation: Generation, output: Output) -> Event | None:
        self.num_cached += output.cached_tokens or 0
        event = prompt.take(output)
        if event is not None and event.finish_reason is not None and output.finish_reason is None:
            generation.stop(output.choice)
        return event

    async def joined(self) -> list[Event]:
        """The whole answer: one event a choice, in the order of their indices."""
        whole: dict[int, Event] = {}
        async for event in self.events():
            if event.index in whole:
                whole[event.index].extend(event)
            else:
                whole[event.index] = event
        return [whole[index] for index in sorted(whole)]

    def usage(self, num_generated: int) -> Usage:
        return usage(self.job.num_prompt_tokens, num_generated, self.num_cached)

    def close(self, reason: str) -> None:
        for prompt in self._prompts:
            prompt.close(reason)


def _first_indices(prompts: Sequence[Prompt]) -> list[int]:
    """Choices are numbered prompt-major: where each prompt's begin."""
    firsts, total = [], 0
    for prompt in prompts:
        firsts.append(total)
        total += len(prompt.settings)
    return firsts


class _PromptText:
    """One prompt's choices as they grow, with the echo of the prompt before each."""

    def __init__(self, job: Job, prompt: Prompt, first: int, metrics: EngineMetrics) -> None:
        self._job = job
        self._prompt = prompt
        self._metrics = metrics
        self._logprobs: list[TokenNews] | None = None  # the echoed prompt's
        self._has_started = False
        self._choices = [
            ChoiceText(
                first + number,
                settings,
                self._detokenizer(),
                StopStrings(job.text.stop, job.text.include_stop),
                include_stop=job.text.include_stop,
                offset=len(prompt.echo),
            )
            for number, settings in enumerate(prompt.settings)
        ]
        self._times = [ChoiceTimes(metrics, job.arrival, len(prompt.ids)) for _ in self._choices]

    @property
    def is_finished(self) -> bool:
        return all(choice.is_finished for choice in self._choices)

    def take(self, output: Output) -> Event | None:
        """The event of ``output``; None for a choice that has ended already."""
        if output.finish_reason == "error":
            raise EngineFailure(output.error or "The engine failed on this request.")
        if output.finish_reason == "cancelled":
            raise EngineFailure("The engine gave this request up; try again.")
        choice, times = self._choices[output.choice], self._times[output.choice]
        if choice.is_finished:
            return None
        times.note(output)
        if output.prompt_logprobs is not None and self._job.text.echo_logprobs:
            self._logprobs = self._prompt_news(output)
        event = self._push(choice, output)
        self._metrics.num_dropped += len(output.tokens) - event.num_tokens
        if event.finish_reason is not None:
            times.close(event.finish_reason)
        return event

    def _push(self, choice: ChoiceText, output: Output) -> Event:
        is_first = not choice.has_started
        event = choice.push(output)
        event.prompt_logprobs = output.prompt_logprobs
        if is_first:
            event.is_first = True
            if self._prompt.echo:
                event.pieces.insert(0, self._prompt.echo)
            event.logprobs[:0] = self._logprobs or []
        if not self._has_started:
            self._has_started = True
            self._metrics.prompt_tokens.inc(len(self._prompt.ids))
        return event

    def _prompt_news(self, output: Output) -> list[TokenNews]:
        assert output.prompt_logprobs is not None
        detokenizer, offset, news = self._detokenizer(()), 0, []
        for token, logprob in zip(self._prompt.ids, output.prompt_logprobs, strict=True):
            news.append(TokenNews(token, logprob, offset))
            offset += len(detokenizer.push(token))
        return news

    def _detokenizer(self, prompt_ids: Sequence[int] | None = None) -> Detokenizer:
        return Detokenizer(
            self._job.tokenizer,
            prompt_ids=self._prompt.ids if prompt_ids is None else prompt_ids,
            skip_special_tokens=self._job.text.skip_special_tokens,
            spaces_between_special_tokens=self._job.text.spaces_between_special_tokens,
        )

    def close(self, reason: str) -> None:
        for times in self._times:
            times.close(reason)


async def _merged(generations: Sequence[Generation]) -> AsyncGenerator[tuple[int, Output], None]:
    """Outputs of all, with the number of the generation they come from.

    Each generation holds back (and merges) what nobody has asked for yet, so a slow reader of many
    prompts costs one output each.
    """
    if len(generations) == 1:
        async for output in generations[0]:
            yield 0, output
        return
    queue: asyncio.Queue[tuple[int, Output | Exception | None]] = asyncio.Queue(maxsize=1)
    tasks = [
        asyncio.create_task(_pump(number, generation, queue))
        for number, generation in enumerate(generations)
    ]
    try:
        unfinished = len(tasks)
        while unfinished:
            number, item = await queue.get()
            if item is None:
                unfinished -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield number, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(
    number: int,
    generation: Generation,
    queue: asyncio.Queue[tuple[int, Output | Exception | None]],
) -> None:
    try:
        async for output in generation:
            await queue.put((number, output))
    except Exception as error:
        await queue.put((number, error))
    else:
        await queue.put((number, None))
