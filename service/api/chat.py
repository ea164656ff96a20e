"""``POST /v1/chat/completions``."""

from __future__ import annotations

import secrets
import time
from collections import defaultdict

from fastapi import APIRouter
from msgspec import UNSET, Struct, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from service.api.body import read_body
from service.api.conversation import Chat, prepare
from service.api.jobs import respond
from service.api.logprobs import LogprobWriter
from service.api.meter import Meter
from service.api.openapi import documented
from service.api.reading import AnswerReader, CallDelta, Delta, ReasoningCount, joined
from service.api.schemas.answers import PromptLogprobs, Usage
from service.api.schemas.chat import (
    AnsweredCall,
    AnsweredFunction,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    ChatRequest,
    FinishReason,
    FunctionChunk,
    ToolCallChunk,
)
from service.api.server import server_of
from service.api.text import Event

router = APIRouter()
SERVICE_TIER = "default"  # whichever was asked for: there is one


@router.post("/v1/chat/completions", **documented(ChatRequest, ChatCompletion, streams=True))
async def create_chat_completion(request: Request) -> Response:
    """Answer a conversation, whole or as server-sent events."""
    server = server_of(request)
    exchange = server.receive(request)
    fields = await read_body(request, ChatRequest)
    chat = await prepare(fields, server, exchange)
    shape = ChatShape(fields, chat)
    return respond(fields, server, exchange, chat.job, shape, chat.headers)


class ChatShape:
    """Events as ``chat.completion`` objects and their chunks."""

    def __init__(self, fields: ChatRequest, chat: Chat) -> None:
        self._job = job = chat.job
        self._readers: dict[int, AnswerReader] = defaultdict(chat.reader)
        self._thoughts: dict[int, ReasoningCount] = {}
        self._calls_alone = chat.calls_alone
        self._id = f"chatcmpl-{secrets.token_hex(16)}"
        self._created = int(time.time())
        self._model = fields.model or job.model.name
        self._tier: str | UnsetType = UNSET if fields.service_tier is None else SERVICE_TIER
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
            role = ChatDelta(role="assistant", content=UNSET if self._calls_alone else "")
            opening = self._chunk([ChatChunkChoice(event.index, role)], usage)
            if self._has_ids:
                opening.prompt_token_ids = self._job.prompts[0].ids
            chunks.append(opening)
        delta, logprobs = self._read(event), self._read_logprobs(event)
        if usage:
            self._count_reasoning(usage)
        if delta or logprobs or self._has_ids or event.finish_reason is not None:
            choice = ChatChunkChoice(
                event.index,
                _chat_delta(delta),
                logprobs,
                token_ids=event.tokens if self._has_ids else UNSET,
            )
            chunks.append(self._chunk([choice], usage))
            if delta.calls and event.finish_reason is not None:
                # OpenAI's helper takes a call's end from a chunk that brings no more of it.
                choice = ChatChunkChoice(event.index, ChatDelta())
                chunks.append(self._chunk([choice], usage))
            choice.finish_reason = self._finish_reason(event)
            choice.stop_reason = event.stop_reason
        return chunks

    def _read(self, event: Event) -> Delta:
        reader = self._readers[event.index]
        count = self._thoughts.setdefault(event.index, ReasoningCount(reader))
        count.add(event.offsets)
        delta = reader.push(event.text) if event.pieces else Delta()
        return delta if event.finish_reason is None else delta + reader.flush()

    def _count_reasoning(self, usage: Usage) -> None:
        usage.completion_tokens_details.reasoning_tokens = sum(
            count.num_tokens for count in self._thoughts.values()
        )

    def account(self, meter: Meter) -> None:
        meter.response_id = self._id
        meter.num_reasoning = sum(count.num_tokens for count in self._thoughts.values())
        for index, reason in meter.endings.items():
            reader = self._readers.get(index)
            if reason == "stop" and reader is not None and reader.has_calls:
                meter.endings[index] = "tool_calls"

    def _finish_reason(self, event: Event) -> FinishReason | None:
        if event.finish_reason == "stop" and self._readers[event.index].has_calls:
            return "tool_calls"
        return event.finish_reason  # type: ignore[return-value]

    def _read_logprobs(self, event: Event) -> ChatLogprobs | None:
        if not self._has_logprobs or not event.logprobs:
            return None
        return self._logprobs.chat(event.logprobs)

    def last_chunks(self, usage: Usage) -> list[Struct]:
        self._count_reasoning(usage)
        return [self._chunk([], usage)]

    def _chunk(self, choices: list[ChatChunkChoice], usage: Usage | UnsetType | None) -> ChatChunk:
        return ChatChunk(
            id=self._id,
            created=self._created,
            model=self._model,
            system_fingerprint=self._job.fingerprint,
            choices=choices,
            usage=usage,
            service_tier=self._tier,
        )

    def whole(self, events: list[Event], usage: Usage) -> Struct:
        choices = [self._choice(event) for event in events]
        self._count_reasoning(usage)
        answer = ChatCompletion(
            id=self._id,
            created=self._created,
            model=self._model,
            system_fingerprint=self._job.fingerprint,
            choices=choices,
            usage=usage,
            service_tier=self._tier,
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
        delta = self._read(event)
        return ChatChoice(
            index=event.index,
            message=_chat_message(delta, self._calls_alone),
            logprobs=self._logprobs.chat(event.logprobs) if self._has_logprobs else None,
            finish_reason=self._finish_reason(event),
            stop_reason=event.stop_reason,
            token_ids=event.tokens if self._has_ids else UNSET,
        )


def _chat_delta(delta: Delta) -> ChatDelta:
    chunk = ChatDelta()
    if delta.content:
        chunk.content = delta.content
    if delta.reasoning:
        chunk.reasoning_content = delta.reasoning
    if calls := [call for call in delta.calls if not call.is_broken]:
        chunk.tool_calls = [_call_chunk(call) for call in joined(calls)]
    return chunk


def _call_chunk(call: CallDelta) -> ToolCallChunk:
    if call.name is None:
        return ToolCallChunk(call.index, FunctionChunk(call.arguments))
    function = FunctionChunk(call.arguments, call.name)
    return ToolCallChunk(call.index, function, call.id or UNSET, "function")


def _chat_message(delta: Delta, calls_alone: bool) -> ChatMessage:
    calls = delta.whole_calls()
    has_content = delta.content or not (calls or calls_alone)
    message = ChatMessage(delta.content if has_content else None)
    if delta.reasoning:
        message.reasoning_content = delta.reasoning
    if calls:
        message.tool_calls = [
            AnsweredCall(call.id or "", AnsweredFunction(call.name or "", call.arguments))
            for call in calls
        ]
    return message
