"""What ``POST /v1/responses`` answers: the response, its items, and the events of its stream."""

from __future__ import annotations

from typing import Any, Literal

from msgspec import Struct

from service.api.schemas.chat import ChatTokenLogprob
from service.redaction import Redacted

Status = Literal["in_progress", "completed", "incomplete"]


class OutputText(Redacted, Struct, tag_field="type", tag="output_text"):
    text: str = ""
    annotations: list[Any] = []
    logprobs: list[ChatTokenLogprob] = []


class ReasoningText(Redacted, Struct, tag_field="type", tag="reasoning_text"):
    text: str = ""


class OutputMessage(Redacted, Struct, tag_field="type", tag="message"):
    id: str
    status: Status
    content: list[OutputText]
    role: Literal["assistant"] = "assistant"


class ReasoningItem(Redacted, Struct, tag_field="type", tag="reasoning"):
    id: str
    status: Status
    content: list[ReasoningText]
    summary: list[Any] = []
    encrypted_content: None = None


class FunctionCall(Redacted, Struct, tag_field="type", tag="function_call"):
    id: str
    status: Status
    call_id: str
    name: str
    arguments: str


Item = OutputMessage | ReasoningItem | FunctionCall


class InputTokensDetails(Struct):
    """``cache_write_tokens`` has a price elsewhere; here all that is computed is cached."""

    cached_tokens: int
    cache_write_tokens: int = 0


class OutputTokensDetails(Struct):
    reasoning_tokens: int


class ResponseUsage(Struct):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class IncompleteDetails(Struct):
    reason: Literal["max_output_tokens", "content_filter"]


class ResponseError(Redacted, Struct):
    code: str
    message: str


class ModelResponse(Redacted, Struct, kw_only=True):
    """The request's settings are told as they counted."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None = None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    background: Literal[False] = False
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    model: str
    output: list[Item] = []
    parallel_tool_calls: bool
    previous_response_id: None = None
    prompt_cache_key: str | None
    reasoning: dict[str, Any]
    safety_identifier: str | None
    service_tier: Literal["default"] = "default"
    store: Literal[False] = False
    temperature: float
    text: dict[str, Any]
    tool_choice: Any
    tools: list[Any]
    top_logprobs: int
    top_p: float
    truncation: Literal["auto", "disabled"]
    usage: ResponseUsage | None = None
    user: str | None
    metadata: dict[str, str]


class InputTokens(Struct):
    input_tokens: int
    object: Literal["response.input_tokens"] = "response.input_tokens"


class ResponseCreated(Redacted, Struct, tag_field="type", tag="response.created"):
    sequence_number: int
    response: ModelResponse


class ResponseInProgress(Redacted, Struct, tag_field="type", tag="response.in_progress"):
    sequence_number: int
    response: ModelResponse


class ResponseCompleted(Redacted, Struct, tag_field="type", tag="response.completed"):
    sequence_number: int
    response: ModelResponse


class ResponseIncomplete(Redacted, Struct, tag_field="type", tag="response.incomplete"):
    sequence_number: int
    response: ModelResponse


class ResponseFailed(Redacted, Struct, tag_field="type", tag="response.failed"):
    sequence_number: int
    response: ModelResponse


class ErrorEvent(Redacted, Struct, tag_field="type", tag="error"):
    sequence_number: int
    code: str | None
    message: str
    param: str | None


class ItemAdded(Redacted, Struct, tag_field="type", tag="response.output_item.added"):
    sequence_number: int
    output_index: int
    item: Item


class ItemDone(Redacted, Struct, tag_field="type", tag="response.output_item.done"):
    sequence_number: int
    output_index: int
    item: Item


class PartAdded(Redacted, Struct, tag_field="type", tag="response.content_part.added"):
    sequence_number: int
    item_id: str
    output_index: int
    part: OutputText | ReasoningText
    content_index: int = 0


class PartDone(Redacted, Struct, tag_field="type", tag="response.content_part.done"):
    sequence_number: int
    item_id: str
    output_index: int
    part: OutputText | ReasoningText
    content_index: int = 0


class TextDelta(Redacted, Struct, tag_field="type", tag="response.output_text.delta"):
    sequence_number: int
    item_id: str
    output_index: int
    delta: str
    logprobs: list[ChatTokenLogprob]
    content_index: int = 0


class TextDone(Redacted, Struct, tag_field="type", tag="response.output_text.done"):
    sequence_number: int
    item_id: str
    output_index: int
    text: str
    logprobs: list[ChatTokenLogprob]
    content_index: int = 0


class ReasoningDelta(Redacted, Struct, tag_field="type", tag="response.reasoning_text.delta"):
    sequence_number: int
    item_id: str
    output_index: int
    delta: str
    content_index: int = 0


class ReasoningDone(Redacted, Struct, tag_field="type", tag="response.reasoning_text.done"):
    sequence_number: int
    item_id: str
    output_index: int
    text: str
    content_index: int = 0


class ArgumentsDelta(
    Redacted, Struct, tag_field="type", tag="response.function_call_arguments.delta"
):
    sequence_number: int
    item_id: str
    output_index: int
    delta: str


class ArgumentsDone(
    Redacted, Struct, tag_field="type", tag="response.function_call_arguments.done"
):
    sequence_number: int
    item_id: str
    output_index: int
    arguments: str


ResponseEvent = (
    ResponseCreated
    | ResponseInProgress
    | ResponseCompleted
    | ResponseIncomplete
    | ResponseFailed
    | ErrorEvent
    | ItemAdded
    | ItemDone
    | PartAdded
    | PartDone
    | TextDelta
    | TextDone
    | ReasoningDelta
    | ReasoningDone
    | ArgumentsDelta
    | ArgumentsDone
)
