"""Events as the items of a response: OpenAI's stream of named events, or what it ends with."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from typing import Any

from msgspec import Struct, UnsetType
from msgspec.structs import replace

from service.api.conversation import Chat
from service.api.logprobs import LogprobWriter
from service.api.meter import Meter
from service.api.parts import AnswerParts, Change, Part
from service.api.response_input import has_logprobs
from service.api.schemas.answers import Usage
from service.api.schemas.chat import ChatTokenLogprob
from service.api.schemas.response_events import (
    ArgumentsDelta,
    ArgumentsDone,
    ErrorEvent,
    FunctionCall,
    IncompleteDetails,
    InputTokensDetails,
    Item,
    ItemAdded,
    ItemDone,
    ModelResponse,
    OutputMessage,
    OutputText,
    OutputTokensDetails,
    PartAdded,
    PartDone,
    ReasoningDelta,
    ReasoningDone,
    ReasoningItem,
    ReasoningText,
    ResponseCompleted,
    ResponseCreated,
    ResponseError,
    ResponseFailed,
    ResponseIncomplete,
    ResponseInProgress,
    ResponseUsage,
    Status,
    TextDelta,
    TextDone,
)
from service.api.schemas.responses import ResponseRequest
from service.api.text import Event, TokenNews
from service.errors import PronkError

PREFIXES = {"text": "msg", "reasoning": "rs", "call": "fc"}


class ResponseShape:
    def __init__(self, request: ResponseRequest, chat: Chat) -> None:
        self._parts = AnswerParts(chat.reader())
        self._ids: list[str] = []  # of the items, by their index
        self._num_events = 0
        self._finish_reason: str | None = None
        self._has_logprobs = has_logprobs(request)
        self._logprobs = LogprobWriter(chat.job.tokenizer, most=request.top_logprobs or 0)
        self._response = new_response(request, chat)

    def chunks(self, event: Event, usage: Usage | UnsetType | None) -> list[Struct]:
        chunks = self._open() if event.is_first else []
        for change in self._read(event):
            chunks += self._show(change)
        return chunks

    def last_chunks(self, usage: Usage) -> list[Struct]:
        response = self._finished(usage)
        last = ResponseCompleted if response.status == "completed" else ResponseIncomplete
        return [last(self._number(), response)]

    def account(self, meter: Meter) -> None:
        meter.response_id = self._response.id
        self._parts.account(meter)

    def whole(self, events: list[Event], usage: Usage) -> Struct:
        [event] = events
        for _ in self._read(event):
            pass
        return self._finished(usage)

    def failure(self, error: PronkError) -> list[Struct]:
        """An error, and the response as far as it got."""
        opening = [] if self._num_events else self._open()
        code = error.code or error.type
        failed = replace(
            self._response,
            status="failed",
            error=ResponseError("server_error", error.message),
            output=[self._item(part, "incomplete") for part in self._parts.kept],
        )
        return [
            *opening,
            ErrorEvent(self._number(), code, error.message, error.param),
            ResponseFailed(self._number(), failed),
        ]

    def _open(self) -> list[Struct]:
        return [
            ResponseCreated(self._number(), self._response),
            ResponseInProgress(self._number(), self._response),
        ]

    def _number(self) -> int:
        self._num_events += 1
        return self._num_events - 1

    def _read(self, event: Event) -> Iterator[Change]:
        for change in self._parts.push(event):
            if change.what == "opened":
                self._ids.append(f"{PREFIXES[change.part.kind]}_{secrets.token_hex(16)}")
            yield change
        self._finish_reason = event.finish_reason

    def _show(self, change: Change) -> list[Struct]:
        match change.what:
            case "opened":
                return self._opened(change.part)
            case "grew":
                return [self._grew(change)]
        return self._closed(change.part)

    def _opened(self, part: Part) -> list[Struct]:
        item_id, item = self._ids[part.index], self._item(part, "in_progress", is_new=True)
        added: list[Struct] = [ItemAdded(self._number(), part.index, item)]
        if part.kind != "call":
            empty = OutputText() if part.kind == "text" else ReasoningText()
            added.append(PartAdded(self._number(), item_id, part.index, empty))
        return added

    def _grew(self, change: Change) -> Struct:
        number, item_id, index = self._number(), self._ids[change.part.index], change.part.index
        match change.part.kind:
            case "text":
                logprobs = self._records(change.logprobs)
                return TextDelta(number, item_id, index, change.text, logprobs)
            case "reasoning":
                return ReasoningDelta(number, item_id, index, change.text)
        return ArgumentsDelta(number, item_id, index, change.text)

    def _closed(self, part: Part) -> list[Struct]:
        item_id, index = self._ids[part.index], part.index
        done: list[Struct] = []
        match part.kind:
            case "text":
                text = self._text(part)
                done = [
                    TextDone(self._number(), item_id, index, text.text, text.logprobs),
                    PartDone(self._number(), item_id, index, text),
                ]
            case "reasoning":
                done = [
                    ReasoningDone(self._number(), item_id, index, part.text),
                    PartDone(self._number(), item_id, index, ReasoningText(part.text)),
                ]
            case "call":
                done = [ArgumentsDone(self._number(), item_id, index, part.text)]
        return [*done, ItemDone(self._number(), index, self._item(part, _status(part)))]

    def _item(self, part: Part, status: Status, *, is_new: bool = False) -> Item:
        """``is_new``: without the contents, which come as events of their own."""
        item_id = self._ids[part.index]
        match part.kind:
            case "text":
                return OutputMessage(item_id, status, [] if is_new else [self._text(part)])
            case "reasoning":
                return ReasoningItem(item_id, status, [] if is_new else [ReasoningText(part.text)])
        assert part.call is not None
        call_id = part.call.id or item_id
        return FunctionCall(item_id, status, call_id, part.call.name or "", part.text)

    def _text(self, part: Part) -> OutputText:
        return OutputText(part.text, logprobs=self._records(part.logprobs))

    def _records(self, news: list[TokenNews]) -> list[ChatTokenLogprob]:
        return self._logprobs.chat(news).content if self._has_logprobs else []

    def _finished(self, usage: Usage) -> ModelResponse:
        answer = replace(
            self._response,
            status="completed",
            output=[self._item(part, _status(part)) for part in self._parts.kept],
            usage=_usage(usage, self._parts.num_reasoning_tokens),
        )
        match self._finish_reason:
            case "stop":
                answer.completed_at = int(time.time())
            case "content_filter":
                answer.status = "incomplete"
                answer.incomplete_details = IncompleteDetails("content_filter")
            case _:
                answer.status = "incomplete"
                answer.incomplete_details = IncompleteDetails("max_output_tokens")
        return answer


def _status(part: Part) -> Status:
    return "incomplete" if part.is_cut else "completed"


def _usage(usage: Usage, num_reasoning: int) -> ResponseUsage:
    return ResponseUsage(
        usage.prompt_tokens,
        InputTokensDetails(usage.prompt_tokens_details.cached_tokens),
        usage.completion_tokens,
        OutputTokensDetails(num_reasoning),
        usage.total_tokens,
    )


def new_response(request: ResponseRequest, chat: Chat) -> ModelResponse:
    """What a stream opens with: the request's settings, as they count."""
    settings = chat.job.prompts[0].settings[0]
    reasoning = {"effort": request.reasoning and request.reasoning.effort, "summary": None}
    return ModelResponse(
        id=f"resp_{secrets.token_hex(24)}",
        created_at=int(time.time()),
        status="in_progress",
        instructions=request.instructions,
        max_output_tokens=request.max_output_tokens,
        max_tool_calls=request.max_tool_calls,
        model=request.model or chat.job.model.name,
        parallel_tool_calls=request.parallel_tool_calls is not False,
        prompt_cache_key=request.prompt_cache_key,
        reasoning=reasoning,
        safety_identifier=request.safety_identifier,
        temperature=settings.temperature,
        text={"format": _format(request)},
        tool_choice=_tool_choice(request),
        tools=[
            {
                "type": "function",
                "name": tool.name,
                "description": tool.description,
                "parameters": tool.parameters,
                "strict": tool.strict,
            }
            for tool in request.tools or ()
        ],
        top_logprobs=request.top_logprobs or 0,
        top_p=settings.top_p,
        truncation=request.truncation or "disabled",
        user=request.user,
        metadata=request.metadata or {},
    )


def _format(request: ResponseRequest) -> dict[str, Any]:
    wanted = request.text and request.text.format
    if not wanted:
        return {"type": "text"}
    return wanted.model_dump(by_alias=True, exclude_none=True)


def _tool_choice(request: ResponseRequest) -> Any:
    choice = request.tool_choice
    if choice is None or isinstance(choice, str):
        return choice or "auto"
    return choice.model_dump()
