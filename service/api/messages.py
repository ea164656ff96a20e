"""``POST /v1/messages`` and ``/v1/messages/count_tokens``: Anthropic's shape, upon chat."""

from __future__ import annotations

import secrets
from typing import Any

from fastapi import APIRouter
from msgspec import Struct, UnsetType
from pydantic_core import from_json
from starlette.requests import Request
from starlette.responses import Response

from service.api.anthropic_errors import anthropic_envelope
from service.api.body import read_body
from service.api.conversation import Chat
from service.api.exchange import exchange_of
from service.api.ignored import ignored_headers
from service.api.message_input import count_tokens, prepare_message
from service.api.meter import Meter
from service.api.models import json_response
from service.api.openapi import documented
from service.api.parts import AnswerParts, Change, Part
from service.api.schemas.answers import Usage
from service.api.schemas.messages import (
    Block,
    BlockDelta,
    BlockStart,
    BlockStop,
    CountRequest,
    InputGain,
    MessageAnswer,
    MessageDelta,
    MessagesRequest,
    MessageStart,
    MessageStop,
    MessageUsage,
    Ping,
    StopDelta,
    StopReason,
    TextGain,
    TextOut,
    ThinkingGain,
    ThinkingOut,
    ThinkingTokens,
    TokenCount,
    ToolUseOut,
)
from service.api.server import server_of
from service.api.stream import AnswerResponse, Framing, StreamUsage, named_frame
from service.api.text import Event
from service.errors import PronkError

router = APIRouter()
PING = named_frame(Ping())


@router.post(
    "/v1/messages", **documented(MessagesRequest, MessageAnswer, streams=True, anthropic=True)
)
async def create_message(request: Request) -> Response:
    """Answer a conversation in Anthropic's shape, whole or as its named events."""
    server = server_of(request)
    exchange = server.receive(request)
    fields = await read_body(request, MessagesRequest)
    headers = ignored_headers(fields, server.settings.strict_params)
    chat = await prepare_message(fields, server, exchange)

    def failure(error: PronkError) -> list[Struct]:
        return [anthropic_envelope(error, exchange.request_id)]

    return AnswerResponse(
        chat.job,
        MessageShape(fields, chat),
        metrics=server.metrics,
        exchange=exchange,
        stream=StreamUsage(at_end=True, always=True) if fields.stream else None,
        ping_interval=server.settings.ping_interval,
        headers=chat.headers | headers,
        framing=Framing(named_frame, failure, PING, end=b""),
    )


@router.post("/v1/messages/count_tokens", **documented(CountRequest, TokenCount, anthropic=True))
async def count_message_tokens(request: Request) -> Response:
    """How many input tokens a conversation is."""
    server = server_of(request)
    fields = await read_body(request, CountRequest)
    headers = ignored_headers(fields, server.settings.strict_params)
    counted = await count_tokens(fields, server, exchange_of(request.scope))
    response = json_response(TokenCount(counted))
    response.headers.update(headers)
    return response


class MessageShape:
    """Events as a message of content blocks."""

    def __init__(self, request: MessagesRequest, chat: Chat) -> None:
        self._parts = AnswerParts(chat.reader())
        self._id = f"msg_{secrets.token_hex(12)}"
        self._ids: dict[int, str] = {}  # of calls whose reader gave none, by their part
        self._model = request.model or chat.job.model.name
        self._stop = StopDelta("end_turn", None)

    def chunks(self, event: Event, usage: Usage | UnsetType | None) -> list[Struct]:
        chunks: list[Struct] = []
        if event.is_first:
            assert isinstance(usage, Usage), "a message starts with what its prompt cost"
            start = MessageAnswer(self._id, self._model, [], self._usage(usage))
            chunks.append(MessageStart(start))
        chunks += map(self._show, self._parts.push(event))
        self._note_end(event)
        return chunks

    def last_chunks(self, usage: Usage) -> list[Struct]:
        return [MessageDelta(self._stop, self._usage(usage)), MessageStop()]

    def account(self, meter: Meter) -> None:
        meter.response_id = self._id
        self._parts.account(meter)

    def whole(self, events: list[Event], usage: Usage) -> Struct:
        [event] = events
        for _ in self._parts.push(event):
            pass
        self._note_end(event)
        return MessageAnswer(
            self._id,
            self._model,
            [self._block(part) for part in self._parts.kept],
            self._usage(usage),
            self._stop.stop_reason,
            self._stop.stop_sequence,
        )

    def _usage(self, usage: Usage) -> MessageUsage:
        cached = usage.prompt_tokens_details.cached_tokens
        thinking = ThinkingTokens(self._parts.num_reasoning_tokens)
        return MessageUsage(usage.prompt_tokens - cached, usage.completion_tokens, cached, thinking)

    def _note_end(self, event: Event) -> None:
        if event.finish_reason is not None:
            self._stop = _stop(event, has_calls=self._parts.has_calls)

    def _show(self, change: Change) -> Struct:
        part = change.part
        match change.what:
            case "opened":
                return BlockStart(part.index, self._block(part))
            case "grew":
                return BlockDelta(part.index, _gain(part, change.text))
        return BlockStop(part.index)

    def _block(self, part: Part) -> Block:
        """As far as it has grown."""
        match part.kind:
            case "text":
                return TextOut(part.text)
            case "reasoning":
                return ThinkingOut(part.text)
        assert part.call is not None
        call_id = part.call.id or self._ids.setdefault(part.index, f"toolu_{secrets.token_hex(12)}")
        return ToolUseOut(call_id, part.call.name or "", read_input(part.text))


def read_input(arguments: str) -> dict[str, Any]:
    """Of a call that was cut, what of its JSON can be read, as clients read streams."""
    try:
        found = from_json(arguments or "{}", allow_partial=True)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _gain(part: Part, text: str) -> TextGain | ThinkingGain | InputGain:
    match part.kind:
        case "text":
            return TextGain(text)
        case "reasoning":
            return ThinkingGain(text)
    return InputGain(text)


def _stop(event: Event, *, has_calls: bool) -> StopDelta:
    reason: StopReason = "end_turn"
    match event.finish_reason:
        case "length":
            reason = "max_tokens"
        case "content_filter":
            reason = "refusal"
        case "stop" if has_calls:
            reason = "tool_use"
        case "stop" if isinstance(event.stop_reason, str):
            return StopDelta("stop_sequence", event.stop_reason)
    return StopDelta(reason, None)
