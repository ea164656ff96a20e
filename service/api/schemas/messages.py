"""``POST /v1/messages``: Anthropic's request, its answer, and the events of its stream."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Struct
from pydantic import Field, Tag

from service.api.schemas.sampling import INT64, Fields, StopString
from service.api.schemas.translated import OwnFields, by_type
from service.redaction import Redacted

TEXT_ONLY = "should be a block of type text: this server reads text alone"
USER_BLOCKS = "should be a block of type text or tool_result: this server reads text alone"
BLOCKS = (
    "should be a block of type text, tool_use, tool_result, thinking or redacted_thinking: this "
    "server reads text alone"
)


class Cacheable(Fields):
    """``cache_control`` asks for what happens anyway: every prefix is cached."""

    cache_control: Any = None


class TextBlock(Cacheable):
    type: Literal["text"]
    text: str
    citations: Any = None


class ToolUse(Cacheable):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]
    caller: Any = None


Texts = list[Annotated[Annotated[TextBlock, Tag("text")], by_type(TEXT_ONLY)]]


class ToolResult(Cacheable):
    type: Literal["tool_result"]
    tool_use_id: str
    content: str | Texts | None = None
    is_error: bool | None = None


class Thinking(Fields):
    type: Literal["thinking"]
    thinking: str
    signature: str | None = None


class RedactedThinking(Fields):
    """Another server's, which only that one can read."""

    type: Literal["redacted_thinking"]
    data: str


InputBlock = Annotated[
    Annotated[TextBlock, Tag("text")]
    | Annotated[ToolUse, Tag("tool_use")]
    | Annotated[ToolResult, Tag("tool_result")]
    | Annotated[Thinking, Tag("thinking")]
    | Annotated[RedactedThinking, Tag("redacted_thinking")],
    by_type(BLOCKS),
]


class InputMessage(Fields):
    role: Literal["user", "assistant", "system"]
    content: str | list[InputBlock]


class CustomTool(Cacheable):
    type: Literal["custom"] | None = None
    name: str
    description: str | None = None
    input_schema: dict[str, Any]


SERVER_TOOLS = (
    "should be a tool of type custom: this server has no tools of its own (web_search, bash, "
    "text_editor and the like); declare one with an input_schema and send its result back"
)
MessagesTool = Annotated[
    Annotated[CustomTool, Tag("custom")], by_type(SERVER_TOOLS, default="custom")
]


class ToolChoice(Fields):
    """``name`` belongs to the type ``tool``."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class ThinkingConfig(Fields):
    """Told to the chat template; nothing bounds how long a model thinks."""

    type: Literal["enabled", "disabled", "adaptive"]


class JsonFormat(Fields):
    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(Fields):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: JsonFormat | None = None


class MessagesMetadata(Fields):
    user_id: str | None = None


class ConversationFields(OwnFields):
    """What a prompt is made of; counting takes the same."""

    model: str | None = None
    messages: Annotated[list[InputMessage], Field(min_length=1)]
    system: str | Texts | None = None
    tools: list[MessagesTool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: ThinkingConfig | None = None
    output_config: OutputConfig | None = None
    cache_control: Any = None


class CountRequest(ConversationFields):
    """``POST /v1/messages/count_tokens``."""


class MessagesRequest(ConversationFields):
    max_tokens: Annotated[int, Field(ge=1, lt=INT64)]
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=INT64)] | None = None
    stop_sequences: list[StopString] | None = None
    stream: bool | None = None
    metadata: MessagesMetadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None


class TextOut(Redacted, Struct, tag_field="type", tag="text"):
    text: str


class ThinkingOut(Redacted, Struct, tag_field="type", tag="thinking"):
    """Nothing is signed here."""

    thinking: str
    signature: str = ""


class ToolUseOut(Redacted, Struct, tag_field="type", tag="tool_use"):
    id: str
    name: str
    input: dict[str, Any]


Block = TextOut | ThinkingOut | ToolUseOut


class ThinkingTokens(Struct):
    thinking_tokens: int


class MessageUsage(Struct):
    """All input is ``input_tokens`` and what was read from the cache."""

    input_tokens: int
    output_tokens: int
    cache_read_input_tokens: int
    output_tokens_details: ThinkingTokens
    cache_creation_input_tokens: int = 0


StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "refusal"]


class MessageAnswer(Redacted, Struct, tag_field="type", tag="message"):
    id: str
    model: str
    content: list[Block]
    usage: MessageUsage
    stop_reason: StopReason | None = None
    stop_sequence: str | None = None
    role: Literal["assistant"] = "assistant"


class TokenCount(Struct):
    input_tokens: int


class MessageStart(Redacted, Struct, tag_field="type", tag="message_start"):
    message: MessageAnswer


class BlockStart(Redacted, Struct, tag_field="type", tag="content_block_start"):
    index: int
    content_block: Block


class TextGain(Redacted, Struct, tag_field="type", tag="text_delta"):
    text: str


class ThinkingGain(Redacted, Struct, tag_field="type", tag="thinking_delta"):
    thinking: str


class InputGain(Redacted, Struct, tag_field="type", tag="input_json_delta"):
    partial_json: str


class BlockDelta(Redacted, Struct, tag_field="type", tag="content_block_delta"):
    index: int
    delta: TextGain | ThinkingGain | InputGain


class BlockStop(Struct, tag_field="type", tag="content_block_stop"):
    index: int


class StopDelta(Redacted, Struct):
    stop_reason: StopReason
    stop_sequence: str | None


class MessageDelta(Redacted, Struct, tag_field="type", tag="message_delta"):
    delta: StopDelta
    usage: MessageUsage


class MessageStop(Struct, tag_field="type", tag="message_stop"):
    pass


class Ping(Struct, tag_field="type", tag="ping"):
    pass


MessageEvent = (
    MessageStart | BlockStart | BlockDelta | BlockStop | MessageDelta | MessageStop | Ping
)
