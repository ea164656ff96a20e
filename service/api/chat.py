"""``POST /v1/chat/completions``."""

from __future__ import annotations

import secrets
import time

from fastapi import APIRouter
from msgspec import UNSET, Struct, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from service.api.body import read_body
from service.api.jobs import check, make_job, make_sampling, respond, truncation
from service.api.logprobs import LogprobWriter
from service.api.openapi import documented
from service.api.prompts import encode_chat, truncate
from service.api.schemas.answers import PromptLogprobs, Usage
from service.api.schemas.chat import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    ChatRequest,
)
from service.api.server import Server, server_of
from service.api.submission import Job, Prompt
from service.api.text import Event
from service.errors import InvalidRequest
from service.registry import ServedModel

router = APIRouter()


@router.post("/v1/chat/completions", **documented(ChatRequest, ChatCompletion, streams=True))
async def create_chat_completion(request: Request) -> Response:
    """Answer a conversation, whole or as server-sent events."""
    server = server_of(request)
    exchange = server.receive(request)
    fields = await read_body(request, ChatRequest)
    budget, max_tokens = read_max_tokens(fields)
    logprobs = read_logprobs(fields)
    model, engine, headers = check(fields, server)
    sampling = make_sampling(
        fields,
        server,
        model,
        logprobs=logprobs,
        max_tokens=max_tokens,
        default_max_tokens=None,
        prompt_param="messages",
        budget_param=budget,
    )
    ids = await read_conversation(fields, server, model)
    kept = truncate(ids, truncation(fields, sampling), fields.truncation_side)
    prompt = Prompt(kept, sampling.for_prompt(len(kept)), _echo(fields))
    job = make_job(fields, server, exchange, model, engine, [prompt])
    return respond(fields, server, exchange, job, ChatShape(fields, job), headers)


def read_max_tokens(fields: ChatRequest) -> tuple[str, int | None]:
    """The field that counts and its value: the newer name wins over ``max_tokens``."""
    name = "max_tokens" if fields.max_completion_tokens is None else "max_completion_tokens"
    value: int | None = getattr(fields, name)
    if value == 0:
        raise InvalidRequest(f"{name}: must be at least 1", param=name)
    return name, value


def read_logprobs(fields: ChatRequest) -> int | None:
    """How many alternatives each token gets; None is no logprobs at all."""
    if fields.logprobs:
        return fields.top_logprobs or 0
    if fields.top_logprobs:
        raise InvalidRequest("top_logprobs: needs logprobs: true", param="top_logprobs")
    return None


async def read_conversation(fields: ChatRequest, server: Server, model: ServedModel) -> list[int]:
    effort = fields.reasoning_effort
    return await encode_chat(
        fields.messages,
        fields,
        model,
        allow_template=server.settings.allow_request_chat_template,
        add_special_tokens=bool(fields.add_special_tokens),
        extra={} if effort is None else {"reasoning_effort": effort},
    )


def _echo(fields: ChatRequest) -> str:
    """As vLLM: an answer that continues the assistant's own last message may repeat it first."""
    last = fields.messages[-1]
    return (last.text() or "") if fields.echo and last.role == "assistant" else ""


class ChatShape:
    """Events as ``chat.completion`` objects and their chunks."""

    def __init__(self, fields: ChatRequest, job: Job) -> None:
        self._job = job
        self._id = f"chatcmpl-{secrets.token_hex(16)}"
        self._created = int(time.time())
        self._model = fields.model or job.model.name
        self._has_logprobs = bool(fields.logprobs)
        self._has_ids = bool(fields.return_token_ids)
        self._prompt_alternatives = fields.prompt_logprobs
        self._logprobs = LogprobWriter(
            job.tokenizer,
            as_ids=bool(fields.return_tokens_as_token_ids),
            most=fields.top_logprobs or 0,
        )

    def chunks(self, event: Event, usage: Usage | UnsetType | None) -> list[Struct]:
        """The role comes first, in a chunk of its own, as OpenAI sends it."""
        chunks: list[Struct] = []
        if event.is_first:
            role = ChatDelta(role="assistant", content="")
            opening = self._chunk([ChatChunkChoice(event.index, role)], usage)
            if self._has_ids:
                opening.prompt_token_ids = self._job.prompts[0].ids
            chunks.append(opening)
        text, logprobs = event.text, self._read_logprobs(event)
        if text or logprobs or self._has_ids or event.finish_reason is not None:
            choice = ChatChunkChoice(
                event.index,
                ChatDelta(content=text) if text else ChatDelta(),
                logprobs,
                event.finish_reason,  # type: ignore[arg-type]
                event.stop_reason,
                event.tokens if self._has_ids else UNSET,
            )
            chunks.append(self._chunk([choice], usage))
        return chunks

    def _read_logprobs(self, event: Event) -> ChatLogprobs | None:
        if not self._has_logprobs or not event.logprobs:
            return None
        return self._logprobs.chat(event.logprobs)

    def last_chunk(self, usage: Usage) -> Struct:
        return self._chunk([], usage)

    def _chunk(self, choices: list[ChatChunkChoice], usage: Usage | UnsetType | None) -> ChatChunk:
        return ChatChunk(
            id=self._id,
            created=self._created,
            model=self._model,
            system_fingerprint=self._job.fingerprint,
            choices=choices,
            usage=usage,
        )

    def whole(self, events: list[Event], usage: Usage) -> Struct:
        answer = ChatCompletion(
            id=self._id,
            created=self._created,
            model=self._model,
            system_fingerprint=self._job.fingerprint,
            choices=[self._choice(event) for event in events],
            usage=usage,
        )
        if self._has_ids:
            answer.prompt_token_ids = self._job.prompts[0].ids
        if self._prompt_alternatives is not None:
            answer.prompt_logprobs = self._prompt_logprobs(events)
        return answer

    def _prompt_logprobs(self, events: list[Event]) -> PromptLogprobs:
        ids, most = self._job.prompts[0].ids, self._prompt_alternatives or 0
        for event in events:
            if event.prompt_logprobs is not None:
                return self._logprobs.prompt(ids, event.prompt_logprobs, most)
        return None

    def _choice(self, event: Event) -> ChatChoice:
        return ChatChoice(
            index=event.index,
            message=ChatMessage(event.text),
            logprobs=self._logprobs.chat(event.logprobs) if self._has_logprobs else None,
            finish_reason=event.finish_reason,  # type: ignore[arg-type]
            stop_reason=event.stop_reason,
            token_ids=event.tokens if self._has_ids else UNSET,
        )
