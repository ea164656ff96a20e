"""Handing a job to the engine: taken or refused as a whole, all prompts' outputs in one stream.

A request with more choices than one wave is fed to the engine piece by piece, so that neither its
queue nor its other clients suffer from it.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from service.api.beams import MAX_PATIENCE, search_beams
from service.api.meter import Meter
from service.engine.messages import Output, SamplingSettings, Submit
from service.errors import GrammarRefused, Overloaded
from service.redaction import Redacted, redacted
from service.registry import Engine, Generation, ServedAdapter, ServedModel

if TYPE_CHECKING:
    from model.tokenizer import Tokenizer

WAVE = 256  # sequences a request has in the engine at a time, one prompt's n at least


@dataclass(frozen=True, slots=True, repr=False)
class Prompt(Redacted):
    """``echo`` is the text that opens each choice's answer: the prompt's, or nothing."""

    ids: list[int]
    settings: list[SamplingSettings]  # one a choice
    echo: str = ""
    logprobs_from: int = 1  # the first token whose log-probability is wanted, where the job asks


@dataclass(frozen=True, slots=True, repr=False)
class TextOptions(Redacted):
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    shown_special: frozenset[int] = frozenset()  # special tokens that are never left out
    echo_logprobs: bool = False  # the prompt's tokens stand before the answer's in logprobs


@dataclass(frozen=True, slots=True, repr=False)
class Job(Redacted):
    """One HTTP request, ready for the engine: validated, templated, tokenized."""

    printed: ClassVar[tuple[str, ...]] = ("request_id",)

    model: ServedModel
    engine: Engine
    prompts: list[Prompt]
    text: TextOptions = field(default_factory=TextOptions)
    namespace: bytes = b""
    account: str = ""
    weight: float = 1.0  # of the account, where accounts share the device
    priority: int = 0
    deadline: float | None = None  # seconds from arrival
    max_queue: float | None = None
    prompt_logprobs: int | None = None
    request_id: str = ""
    arrival: float = 0.0  # time.monotonic()
    wave: int = WAVE
    log_content: bool = False
    adapter: ServedAdapter | None = None
    adapter_version: int = 0  # the loading it began with serves all of it
    grammar: str = ""  # what every choice's text must be, see service.api.constraints
    grammar_param: str | None = None  # the field it came from
    pooling: str = ""  # "mean" or "last": final hidden states are asked for, no token
    shown: int | None = None  # of a prompt's n choices, the best so many; None: all
    is_retry: bool = False  # an engine died over it
    length_penalty: float | None = None  # of beam search, whose beams are the choices; None: none
    meter: Meter = field(default_factory=Meter)  # the exchange's

    def __post_init__(self) -> None:
        meter = self.meter
        meter.model = self.model.name
        meter.adapter = "" if self.adapter is None else self.adapter.name
        meter.num_prompt = self.num_prompt_tokens
        meter.num_choices = len(self.prompts) * self.n
        meter.sampling = self.prompts[0].settings[0]

    @property
    def fingerprint(self) -> str:
        return self.model.fingerprint if self.adapter is None else self.adapter.fingerprint

    @property
    def n(self) -> int:
        return len(self.prompts[0].settings)

    @property
    def num_shown(self) -> int:
        """Choices of each prompt that the answer has."""
        return self.n if self.shown is None else self.shown

    @property
    def tokenizer(self) -> Tokenizer:
        assert self.model.tokenizer is not None, "only loaded models get jobs"
        return self.model.tokenizer

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(prompt.ids) for prompt in self.prompts)

    def asked(self) -> list[Submit]:
        """Every prompt as the engine would be given it, for a question about them."""
        return [
            Submit(
                number,
                prompt.ids,
                prompt.settings,
                namespace=self.namespace,
                account=self.account,
                weight=self.weight,
                priority=self.priority,
                prompt_logprobs=self.prompt_logprobs,
                logprobs_from=prompt.logprobs_from,
                adapter="" if self.adapter is None else self.adapter.name,
                adapter_version=self.adapter_version,
                grammar=self.grammar,
                pooling=self.pooling,
            )
            for number, prompt in enumerate(self.prompts)
        ]

    def submit(
        self, number: int, *, is_continuation: bool = False
    ) -> AbstractAsyncContextManager[Generation]:
        """``is_continuation``: a prompt of a later wave."""
        prompt = self.prompts[number]
        if self.length_penalty is not None:
            give_up = None if self.deadline is None else self.arrival + self.deadline
            submit = self._submit
            if is_continuation:
                submit = functools.partial(submit, is_continuation=True)
            return search_beams(prompt.ids, prompt.settings, self.length_penalty, submit, give_up)
        return self._submit(
            prompt.ids,
            prompt.settings,
            logprobs_from=prompt.logprobs_from,
            is_continuation=is_continuation,
        )

    def _submit(
        self,
        ids: list[int],
        settings: list[SamplingSettings],
        is_whole_prompt: bool = True,
        logprobs_from: int = 1,
        is_continuation: bool = False,
    ) -> AbstractAsyncContextManager[Generation]:
        """Its deadline is what is left of the request's."""
        deadline = self.deadline
        if deadline is not None:
            deadline = max(0.001, deadline - (time.monotonic() - self.arrival))
        return self.engine.submit(
            ids,
            settings,
            namespace=self.namespace,
            account=self.account,
            weight=self.weight,
            priority=self.priority,
            deadline=deadline,
            max_queue=self.max_queue,
            prompt_logprobs=self.prompt_logprobs if is_whole_prompt else None,
            request_id=self.request_id,
            adapter="" if self.adapter is None else self.adapter.name,
            adapter_version=self.adapter_version,
            grammar=self.grammar,
            pooling=self.pooling,
            logprobs_from=logprobs_from,
            is_continuation=is_continuation or not is_whole_prompt,
            is_retry=self.is_retry,
            tally=self.meter.tally,
        )


class Arrival(NamedTuple):
    """An output, the prompt it belongs to and the generation it came from."""

    number: int
    generation: Generation
    output: Output

    def __repr__(self) -> str:
        return redacted(self, ("number",))


@asynccontextmanager
async def admitted(job: Job) -> AsyncIterator[list[Generation]]:
    """The first wave of prompts, all of them or none: raises the engine's refusal of any."""
    async with AsyncExitStack() as stack:
        count = max(1, min(len(job.prompts), job.wave // job.n))
        if count == 1:
            try:
                only = await stack.enter_async_context(job.submit(0))
            except GrammarRefused as error:
                raise _about_grammar(error, job) from None
            yield [only]
            return
        entering = [stack.enter_async_context(job.submit(number)) for number in range(count)]
        entered = await asyncio.gather(*entering, return_exceptions=True)
        for refusal in entered:
            if isinstance(refusal, BaseException):
                raise _about_grammar(refusal, job)
        yield [found for found in entered if not isinstance(found, BaseException)]


def _about_grammar(refusal: BaseException, job: Job) -> BaseException:
    """The engine knows the grammar, not the field it came from."""
    if not isinstance(refusal, GrammarRefused):
        return refusal
    field = job.grammar_param
    told = refusal.message if field is None else f"{field}: {refusal.message}"
    return GrammarRefused(told, param=field)


async def outputs(job: Job, first: list[Generation]) -> AsyncGenerator[Arrival, None]:
    """Outputs of all prompts as they come. Whoever iterates holds the first wave open.

    Each generation holds back (and merges) what nobody has asked for yet, so a slow reader of many
    prompts costs one output each.
    """
    if len(job.prompts) == 1:
        async for output in first[0]:
            yield Arrival(0, first[0], output)
        return
    async with aclosing(_many(job, first)) as arrivals:
        async for arrival in arrivals:
            yield arrival


Queue = asyncio.Queue[Arrival | Exception | None]


async def _many(job: Job, first: list[Generation]) -> AsyncGenerator[Arrival, None]:
    """One task a prompt in the engine; as one ends, the next prompt is submitted."""
    queue: Queue = asyncio.Queue(maxsize=1)
    tasks = [
        asyncio.create_task(_guard(_pump(number, generation, queue), queue))
        for number, generation in enumerate(first)
    ]
    try:
        for _ in job.prompts:
            while (item := await queue.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
            if len(tasks) < len(job.prompts):
                late = _submit_late(job, len(tasks), queue)
                tasks.append(asyncio.create_task(_guard(late, queue)))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _guard(work: Coroutine[None, None, None], queue: Queue) -> None:
    """Runs one prompt to its end and says how it was: None, or what went wrong."""
    try:
        await work
    except Exception as error:
        await queue.put(error)
    else:
        await queue.put(None)


async def _pump(number: int, generation: Generation, queue: Queue) -> None:
    async for output in generation:
        await queue.put(Arrival(number, generation, output))


async def _submit_late(job: Job, number: int, queue: Queue) -> None:
    """A prompt of a later wave: the request was accepted, so a full queue only means to wait."""
    while True:
        try:
            async with job.submit(number, is_continuation=True) as generation:
                await _pump(number, generation, queue)
                return
        except Overloaded as error:
            await asyncio.sleep(min(error.retry_after or 1.0, MAX_PATIENCE))
