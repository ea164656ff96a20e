"""``POST /v1/completions``."""

from __future__ import annotations

import secrets
import time

from fastapi import APIRouter
from msgspec import UNSET, Struct, UnsetType
from msgspec.structs import replace
from starlette.requests import Request
from starlette.responses import Response

from service.api.body import read_body
from service.api.exchange import Exchange
from service.api.fill_in_middle import encode_inside, fill_in_middle
from service.api.jobs import check, make_job, make_sampling, respond, truncation
from service.api.logprobs import LogprobWriter
from service.api.meter import Meter
from service.api.openapi import documented
from service.api.prompts import encode, off_loop, truncate
from service.api.sampling import Sampling, check_ids
from service.api.schemas.answers import PromptLogprobs, Usage
from service.api.schemas.completions import Completion, CompletionChoice, CompletionRequest
from service.api.server import Server, server_of
from service.api.submission import Job, Prompt
from service.api.text import Event
from service.errors import InvalidRequest
from service.registry import ServedModel

router = APIRouter()
DEFAULT_MAX_TOKENS = 16


@router.post("/v1/completions", **documented(CompletionRequest, Completion, streams=True))
async def create_completion(request: Request) -> Response:
    """Continue one prompt or many, whole or as server-sent events."""
    server = server_of(request)
    exchange = server.receive(request)
    fields = await read_body(request, CompletionRequest)
    job, headers = await prepare(fields, server, exchange)
    shape = CompletionShape(fields, job)
    return respond(fields, server, exchange, job, shape, headers)


async def prepare(
    fields: CompletionRequest, server: Server, exchange: Exchange
) -> tuple[Job, dict[str, str]]:
    """The job, and the headers that go with any answer."""
    check_fields(fields, server)
    model, engine, headers = check(fields, server, exchange)
    sampling = make_sampling(
        fields,
        server,
        exchange,
        model,
        logprobs=fields.logprobs,
        max_tokens=fields.max_tokens,
        default_max_tokens=DEFAULT_MAX_TOKENS,
        prompt_param="prompt",
        num_prompts=len(fields.prompt),
    )
    prompts = await read_prompts(fields, model, sampling)
    job = make_job(
        fields,
        server,
        exchange,
        model,
        engine,
        prompts,
        echo_logprobs=fields.logprobs if fields.echo else None,
    )
    return job, headers


def check_fields(fields: CompletionRequest, server: Server) -> None:
    if fields.prompt is None:
        raise InvalidRequest("prompt: is required", param="prompt")
    if len(fields.prompt) > server.settings.max_prompts:
        most = server.settings.max_prompts
        raise InvalidRequest(f"prompt: takes at most {most} prompts on this server", param="prompt")
    if fields.suffix and fields.echo:
        raise InvalidRequest("echo: cannot be used with suffix", param="echo")
    if fields.max_tokens == 0 and not fields.echo:
        raise InvalidRequest("max_tokens: must be at least 1, or 0 with echo", param="max_tokens")


async def read_prompts(
    fields: CompletionRequest, model: ServedModel, sampling: Sampling
) -> list[Prompt]:
    """Each prompt's ids, its choices' settings and what is echoed of it."""
    length = truncation(fields, sampling)
    size = sum(map(len, fields.prompt)) + len(fields.prompt) * sampling.n

    if fields.suffix:
        size += len(fields.suffix)
        return await off_loop(size, lambda: fill_between(fields, model, sampling, length))

    def read(number: int) -> Prompt:
        prompt = fields.prompt[number]
        ids = prompt_ids(fields, model, number)
        kept = truncate(ids, length, fields.truncation_side)
        if not kept:
            raise InvalidRequest("prompt: spells no token", param="prompt")
        settings = sampling.for_prompt(len(kept))
        is_whole = isinstance(prompt, str) and len(kept) == len(ids)
        return Prompt(kept, settings, _echo(fields, model, prompt if is_whole else kept))

    return await off_loop(size, lambda: [read(number) for number in range(len(fields.prompt))])


def fill_between(
    fields: CompletionRequest, model: ServedModel, sampling: Sampling, length: int | None
) -> list[Prompt]:
    """Prompt and suffix around what is to be filled in, and the tokens that say it is."""
    tokenizer = model.tokenizer
    assert tokenizer is not None
    tokens = fill_in_middle(tokenizer)
    parse = fields.parse_special_tokens is not False
    after = encode_inside(fields.suffix or "", tokenizer, parse=parse)
    begin = [] if fields.add_special_tokens is False else list(tokenizer.prefix)

    def read(number: int) -> Prompt:
        before = prompt_ids(fields, model, number, special=False)
        if begin and before[: len(begin)] == begin:
            before = before[len(begin) :]  # the client's ids have it already
        ids = tokens.prompt(before, after, begin, length)
        settings = [
            replace(one, eos_token_ids=(*one.eos_token_ids, *tokens.ends))
            if one.eos_token_ids
            else one
            for one in sampling.for_prompt(len(ids))
        ]
        return Prompt(ids, settings)

    return [read(number) for number in range(len(fields.prompt))]


def prompt_ids(
    fields: CompletionRequest, model: ServedModel, number: int, *, special: bool = True
) -> list[int]:
    prompt = fields.prompt[number]
    if isinstance(prompt, str):
        assert model.tokenizer is not None
        special = special and fields.add_special_tokens is not False
        parse = fields.parse_special_tokens is not False
        return encode(prompt, model.tokenizer, special=special, parse=parse)
    check_ids(
        prompt, model.vocabulary, "prompt" if len(fields.prompt) == 1 else f"prompt[{number}]"
    )
    return list(prompt)


def _echo(fields: CompletionRequest, model: ServedModel, prompt: str | list[int]) -> str:
    if not fields.echo:
        return ""
    if isinstance(prompt, str):
        return prompt
    assert model.tokenizer is not None
    return model.tokenizer.decode(
        prompt, skip_special_tokens=fields.skip_special_tokens is not False
    )


class CompletionShape:
    """Events as ``text_completion`` objects."""

    def __init__(self, fields: CompletionRequest, job: Job) -> None:
        self._job = job
        self._n = job.num_shown
        self._id = f"cmpl-{secrets.token_hex(16)}"
        self._created = int(time.time())
        self._model = fields.model or job.model.name
        self._has_logprobs = fields.logprobs is not None
        self._has_ids = bool(fields.return_token_ids)
        self._prompt_alternatives = fields.prompt_logprobs
        self._logprobs = LogprobWriter(
            job.tokenizer,
            as_ids=bool(fields.return_tokens_as_token_ids),
            most=fields.logprobs or 0,
        )

    def chunks(self, event: Event, usage: Usage | UnsetType | None) -> list[Struct]:
        choice = self._choice(event)
        if not event.logprobs:
            choice.logprobs = None
        if event.is_first and self._has_ids:
            choice.prompt_token_ids = self._prompt(event).ids
        shows = choice.text or choice.logprobs or self._has_ids
        if not shows and choice.finish_reason is None:
            return []
        return [self._answer([choice], usage)]

    def last_chunks(self, usage: Usage) -> list[Struct]:
        return [self._answer([], usage)]

    def account(self, meter: Meter) -> None:
        meter.response_id = self._id

    def whole(self, events: list[Event], usage: Usage) -> Struct:
        choices = [self._choice(event) for event in events]
        for choice, event in zip(choices, events, strict=True):
            if self._has_ids:
                choice.prompt_token_ids = self._prompt(event).ids
            if self._prompt_alternatives is not None:
                choice.prompt_logprobs = self._prompt_logprobs(event, events)
        return self._answer(choices, usage)

    def _prompt(self, event: Event) -> Prompt:
        return self._job.prompts[event.index // self._n]

    def _prompt_logprobs(self, event: Event, events: list[Event]) -> PromptLogprobs:
        """They come with the first output of a prompt; each of its choices shows them."""
        first = event.index - event.index % self._n
        ids = self._prompt(event).ids
        for sibling in events[first : first + self._n]:
            if sibling.prompt_logprobs is not None:
                most = self._prompt_alternatives or 0
                return self._logprobs.prompt(ids, sibling.prompt_logprobs, most)
        return None

    def _choice(self, event: Event) -> CompletionChoice:
        return CompletionChoice(
            index=event.index,
            text=event.text,
            logprobs=self._logprobs.completion(event.logprobs) if self._has_logprobs else None,
            finish_reason=event.finish_reason,  # type: ignore[arg-type]
            stop_reason=event.stop_reason,
            token_ids=event.tokens if self._has_ids else UNSET,
        )

    def _answer(
        self, choices: list[CompletionChoice], usage: Usage | UnsetType | None
    ) -> Completion:
        return Completion(
            id=self._id,
            created=self._created,
            model=self._model,
            system_fingerprint=self._job.fingerprint,
            choices=choices,
            usage=usage,
        )
