"""``POST /v1/chat/completions``: its request and its answers, whole and streamed."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import UNSET, Struct, UnsetType
from pydantic import Field

from service.api.schemas.answers import PromptLogprobs, Usage
from service.api.schemas.sampling import INT64, Fields, Logprobs, SamplingFields
from service.api.schemas.tools import ToolChoice, Tools
from service.redaction import Redacted

Role = Literal["developer", "system", "user", "assistant", "tool", "function"]


TEMPLATE_FIELDS = {"role", "name", "tool_call_id"}


ROLES = {"developer": "system", "function": "tool"}  # as templates call them


class TextPart(Fields):
    type: Literal["text"]
    text: str


class CalledFunction(Fields):
    name: str
    arguments: str


class ToolCall(Fields):
    id: str | None = None
    type: Literal["function"] | None = None
    function: CalledFunction

    def for_template(self) -> dict[str, Any]:
        function = {"name": self.function.name, "arguments": self.function.arguments}
        named = {"type": "function", "function": function}
        return named if self.id is None else {"id": self.id, **named}


class Message(Fields):
    """``content`` may be absent only beside calls; ``refusal`` comes back in histories."""

    role: Role
    content: str | Annotated[list[TextPart], Field(min_length=1)] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    function_call: CalledFunction | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None

    def text(self) -> str | None:
        """Parts as one text, a line each, as vLLM joins them."""
        if isinstance(self.content, list):
            return "\n".join(part.text for part in self.content)
        return self.content

    def for_template(self) -> dict[str, Any]:
        """As chat templates of this family read it: they know ``system`` and ``tool``, not
        ``developer`` and ``function``."""
        values = self.model_dump(include=TEMPLATE_FIELDS, exclude_none=True)
        values["role"] = ROLES.get(self.role, self.role)
        values["content"] = self.content or ""
        if isinstance(self.content, list):
            values["content"] = [{"type": "text", "text": part.text} for part in self.content]
        if reasoning := self.reasoning_content or self.reasoning:
            values["reasoning_content"] = reasoning
        if calls := self.calls():
            values["tool_calls"] = [call.for_template() for call in calls]
        return values

    def calls(self) -> list[ToolCall]:
        """Also a call in the older form, of which there is but one."""
        if self.tool_calls or self.function_call is None:
            return self.tool_calls or []
        return [ToolCall(function=self.function_call)]


class TemplateFields(Fields):
    """How messages become a prompt; tokenize takes the same."""

    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Tools | None = None


class ChatRequest(SamplingFields, TemplateFields):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=0, lt=INT64)] | None = None
    logprobs: bool | None = None
    top_logprobs: Logprobs | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    functions: Any = None
    function_call: Any = None


class TopLogprob(Redacted, Struct):
    token: str
    logprob: float
    bytes: list[int] | None


class ChatTokenLogprob(Redacted, Struct):
    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Redacted, Struct):
    content: list[ChatTokenLogprob]
    refusal: None = None


class AnsweredFunction(Redacted, Struct):
    name: str
    arguments: str  # JSON


class AnsweredCall(Redacted, Struct):
    id: str
    function: AnsweredFunction
    type: Literal["function"] = "function"


class ChatMessage(Redacted, Struct):
    """``content`` is null where calls are all there is."""

    content: str | None
    role: Literal["assistant"] = "assistant"
    refusal: None = None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[AnsweredCall] | UnsetType = UNSET


FinishReason = Literal["stop", "length", "tool_calls", "content_filter"]


class ChatChoice(Redacted, Struct):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletion(Redacted, Struct, kw_only=True):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    service_tier: str | UnsetType = UNSET  # where the request had one: the one there is


class FunctionChunk(Redacted, Struct):
    arguments: str = ""  # more of the JSON text
    name: str | UnsetType = UNSET


class ToolCallChunk(Redacted, Struct):
    """A call's first chunk carries its id, type and name."""

    index: int
    function: FunctionChunk
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET


class ChatDelta(Redacted, Struct):
    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCallChunk] | UnsetType = UNSET


class ChatChunkChoice(Redacted, Struct):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | UnsetType = UNSET


class ChatChunk(Redacted, Struct, kw_only=True):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    service_tier: str | UnsetType = UNSET  # where the request had one: the one there is
