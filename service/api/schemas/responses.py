"""``POST /v1/responses``: its request. What it answers is in ``response_events.py``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, Tag

from service.api.schemas.sampling import INT64, Fields, Logprobs
from service.api.schemas.translated import OwnFields, by_type

TEXT_ONLY = "should have the type input_text or output_text: this server reads text alone"
ITEMS = (
    "should be an item of type message, function_call, function_call_output or reasoning: nothing "
    "else is served, and nothing is stored that item_reference could name"
)
ItemStatus = Literal["in_progress", "completed", "incomplete"]


class InputText(Fields):
    """``annotations`` and ``logprobs`` come back in histories."""

    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: Any = None
    logprobs: Any = None


class Refusal(Fields):
    type: Literal["refusal"]
    refusal: str


TextContent = Annotated[
    Annotated[InputText, Tag("input_text")]
    | Annotated[InputText, Tag("output_text")]
    | Annotated[InputText, Tag("text")]
    | Annotated[Refusal, Tag("refusal")],
    by_type(TEXT_ONLY),
]
Content = str | Annotated[list[TextContent], Field(min_length=1)]


class InputMessage(Fields):
    type: Literal["message"] | None = None
    role: Literal["user", "assistant", "system", "developer"]
    content: Content
    id: str | None = None
    status: ItemStatus | None = None
    phase: str | None = None


class FunctionCallInput(Fields):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: ItemStatus | None = None


class FunctionCallOutput(Fields):
    type: Literal["function_call_output"]
    call_id: str
    output: Content
    id: str | None = None
    status: ItemStatus | None = None


class ReasoningPart(Fields):
    type: Literal["reasoning_text", "summary_text"]
    text: str


class ReasoningInput(Fields):
    """``encrypted_content`` is another server's: what is not in ``content`` is not read."""

    type: Literal["reasoning"]
    id: str | None = None
    summary: list[ReasoningPart] | None = None
    content: list[ReasoningPart] | None = None
    encrypted_content: str | None = None
    status: ItemStatus | None = None


InputItem = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[FunctionCallInput, Tag("function_call")]
    | Annotated[FunctionCallOutput, Tag("function_call_output")]
    | Annotated[ReasoningInput, Tag("reasoning")],
    by_type(ITEMS, default="message"),
]


class FunctionTool(Fields):
    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


HOSTED = (
    "should be a tool of type function: this server runs no tools itself (web_search, file_search, "
    "code_interpreter, mcp and the like); declare a function and send its output back"
)
ResponseTool = Annotated[Annotated[FunctionTool, Tag("function")], by_type(HOSTED)]


class NamedTool(Fields):
    type: Literal["function"]
    name: str


class AllowedTools(Fields):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1)]


class TextFormat(Fields):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None
    description: str | None = None


class TextConfig(Fields):
    format: TextFormat | None = None


class Reasoning(Fields):
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None


class ResponseStreamOptions(Fields):
    include_obfuscation: bool | None = None


MetadataKey = Annotated[str, Field(max_length=64)]
MetadataValue = Annotated[str, Field(max_length=512)]


class ResponseRequest(OwnFields):
    model: str | None = None
    input: str | Annotated[list[InputItem], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1, lt=INT64)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=INT64)] | None = None
    top_logprobs: Logprobs | None = None
    include: list[str] | None = None
    text: TextConfig | None = None
    tools: list[ResponseTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | AllowedTools | None = None
    parallel_tool_calls: bool | None = None
    max_tool_calls: Annotated[int, Field(ge=1, lt=INT64)] | None = None
    reasoning: Reasoning | None = None
    truncation: Literal["auto", "disabled"] | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None

    metadata: Annotated[dict[MetadataKey, MetadataValue], Field(max_length=16)] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: str | None = None

    store: bool | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    background: bool | None = None
    prompt: Any = None
