"""A request for a response, as a chat: items to messages, what is not served refused."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from service.api.conversation import Chat, prepare
from service.api.exchange import Exchange
from service.api.ignored import ignored_headers
from service.api.schemas.chat import ChatRequest
from service.api.schemas.responses import (
    AllowedTools,
    FunctionCallInput,
    FunctionCallOutput,
    FunctionTool,
    InputItem,
    InputMessage,
    NamedTool,
    ReasoningInput,
    Refusal,
    ResponseRequest,
    TextContent,
    TextFormat,
)
from service.api.server import Server
from service.api.translation import (
    Message,
    Names,
    call,
    count_prompt,
    function_tool,
    in_words_of,
    merge_systems,
    named_choice,
    renamed,
    to_chat,
)
from service.errors import ContextLengthExceeded, InvalidRequest, NotSupported

LOGPROBS = "message.output_text.logprobs"
NAMES: Names = (
    (r"\bmessages\b(\[\d+\][\w.\[\]]*)?", "input"),
    (r"\bmax_completion_tokens\b", "max_output_tokens"),
    (r"\btruncate_prompt_tokens\b", "truncation: auto"),
    (r"\breasoning_effort\b", "reasoning.effort"),
    (r"\bresponse_format(\.json_schema)?\b", "text.format"),
    (r"(\btools\[\d+\])\.function\b", r"\1"),
    (r"\btool_choice\.(function|allowed_tools)\b", "tool_choice"),
)
STATELESS = {
    "previous_response_id": "this server stores no responses; send the whole conversation in input",
    "conversation": "this server stores no conversations; send the whole conversation in input",
    "background": "this server answers while the client waits; leave it out, and use stream",
    "prompt": "this server stores no prompts; send instructions and input",
}


def refuse_state(request: ResponseRequest) -> None:
    """Raises ``NotSupported`` for whatever would need something stored here."""
    for name, reason in STATELESS.items():
        if getattr(request, name):
            raise NotSupported(f"{name}: {reason}", param=name)


def ignored(request: ResponseRequest, server: Server) -> dict[str, str]:
    """The header that names what is not done. Raises ``InvalidRequest`` under ``strict``."""
    also = [f"include.{name}" for name in request.include or () if name != LOGPROBS]
    if request.stream_options is not None and request.stream_options.include_obfuscation:
        also.append("stream_options.include_obfuscation")
    return ignored_headers(request, server.settings.strict_params, also)


def as_chat(request: ResponseRequest) -> ChatRequest:
    with in_words_of(NAMES):
        return to_chat(request, _values(request))


def _values(request: ResponseRequest) -> dict[str, Any]:
    logprobs = has_logprobs(request)
    return {
        "model": request.model,
        "messages": read_messages(request),
        "max_completion_tokens": request.max_output_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": request.top_k,
        "logprobs": logprobs or None,
        "top_logprobs": (request.top_logprobs or 0) if logprobs else None,
        "response_format": _response_format(request),
        **_tools(request),
        "reasoning_effort": request.reasoning and request.reasoning.effort,
        "stream": request.stream,
        "metadata": request.metadata,
        "user": request.user,
        "service_tier": request.service_tier,
    }


def has_logprobs(request: ResponseRequest) -> bool:
    """Alternatives are a wish for log-probabilities, also where ``include`` does not say so."""
    return LOGPROBS in (request.include or ()) or bool(request.top_logprobs)


def _response_format(request: ResponseRequest) -> dict[str, Any] | None:
    wanted = request.text and request.text.format
    if not wanted or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return {"type": "json_object"}
    return {"type": "json_schema", "json_schema": _json_schema(wanted)}


def _json_schema(wanted: TextFormat) -> dict[str, Any]:
    if wanted.schema_ is None:
        raise InvalidRequest("text.format.schema: is required", param="text.format.schema")
    described = {
        "name": wanted.name or "answer",
        "schema": wanted.schema_,
        "strict": wanted.strict,
        "description": wanted.description,
    }
    return {key: value for key, value in described.items() if value is not None}


def _tools(request: ResponseRequest) -> dict[str, Any]:
    choice: Any = request.tool_choice
    if isinstance(choice, AllowedTools):
        allowed = [named_choice(tool.name) for tool in choice.tools]
        told = {"mode": choice.mode, "tools": allowed}
        choice = {"type": "allowed_tools", "allowed_tools": told}
    elif isinstance(choice, NamedTool):
        choice = named_choice(choice.name)
    if not request.tools:
        return {} if choice in ("auto", "none") else {"tool_choice": choice}
    return {
        "tools": [_function_tool(tool) for tool in request.tools],
        "tool_choice": choice,
        "parallel_tool_calls": request.parallel_tool_calls,
    }


def _function_tool(tool: FunctionTool) -> dict[str, Any]:
    return function_tool(
        tool.name, description=tool.description, parameters=tool.parameters, strict=tool.strict
    )


def read_messages(request: ResponseRequest) -> list[Message]:
    """Instructions first. Reasoning, text and calls in a row are one turn of the assistant."""
    messages: list[Message] = []
    if request.instructions is not None:
        messages.append({"role": "system", "content": request.instructions})
    if isinstance(request.input, str):
        messages.append({"role": "user", "content": request.input})
    else:
        messages += Turns(request.input).messages()
    return merge_systems(messages)


class Turns:
    """Items as chat has them: what the assistant did in one go is one message there."""

    def __init__(self, items: Sequence[InputItem]) -> None:
        self._items = items
        self._turn: Message = {}  # the assistant's, as it grows
        self._called: dict[str, str] = {}  # ids to functions' names

    def messages(self) -> Iterator[Message]:
        for index, item in enumerate(self._items):
            if isinstance(item, InputMessage) and item.role == "assistant":
                if self._turn.keys() & {"content", "tool_calls"}:
                    yield self._end_turn()
                self._turn["content"] = text_of(item.content)
            elif isinstance(item, FunctionCallInput):
                self._called[item.call_id] = item.name
                calls = self._turn.setdefault("tool_calls", [])
                calls.append(call(item.call_id, item.name, item.arguments))
            elif isinstance(item, ReasoningInput):
                if self._turn.keys() & {"content", "tool_calls"}:
                    yield self._end_turn()
                before = self._turn.get("reasoning_content", "")
                self._turn["reasoning_content"] = before + _thoughts(item)
            else:
                if self._turn:
                    yield self._end_turn()
                yield self._other(index, item)
        if self._turn:
            yield self._end_turn()

    def _end_turn(self) -> Message:
        turn, self._turn = self._turn, {}
        if not turn.keys() & {"content", "tool_calls"}:
            turn["content"] = ""
        return {"role": "assistant", **turn}

    def _other(self, index: int, item: InputMessage | FunctionCallOutput) -> Message:
        if isinstance(item, InputMessage):
            return {"role": item.role, "content": text_of(item.content)}
        name = self._called.get(item.call_id)
        if name is None:
            param = f"input[{index}].call_id"
            raise InvalidRequest(f"{param}: no function_call before it has this id", param=param)
        output = text_of(item.output)
        return {"role": "tool", "tool_call_id": item.call_id, "name": name, "content": output}


def text_of(content: str | list[TextContent]) -> str:
    """Parts as one text, a line each, as chat joins them."""
    if isinstance(content, str):
        return content
    return "\n".join(part.refusal if isinstance(part, Refusal) else part.text for part in content)


def _thoughts(item: ReasoningInput) -> str:
    return "".join(part.text for part in item.content or item.summary or ())


async def count_tokens(request: ResponseRequest, server: Server, exchange: Exchange) -> int:
    fields = as_chat(request)
    with in_words_of(NAMES):
        return await count_prompt(fields, server, exchange)


async def prepare_response(request: ResponseRequest, server: Server, exchange: Exchange) -> Chat:
    """Under ``truncation: auto`` the oldest turns are left out until the rest fits."""
    fields = as_chat(request)
    with in_words_of(NAMES):
        try:
            return renamed(await prepare(fields, server, exchange), NAMES)
        except ContextLengthExceeded:
            if request.truncation != "auto":
                raise
        try:
            return renamed(await _prepare_latest(fields, server, exchange), NAMES)
        except ContextLengthExceeded as error:
            error.message = error.message.replace(", or truncate_prompt_tokens", "")
            raise


async def _prepare_latest(fields: ChatRequest, server: Server, exchange: Exchange) -> Chat:
    """The system message and as many of the last turns as fit, found by halving."""
    messages = fields.messages
    opening = messages[:1] if messages[0].role == "system" else []
    starts = [index for index, message in enumerate(messages) if message.role == "user"]
    starts = starts or [len(opening)]
    fitting: Chat | None = None
    low, high = 0, len(starts) - 1
    while low < high or fitting is None:
        middle = (low + high) // 2
        latest = [*opening, *messages[starts[middle] :]]
        try:
            fitting = await prepare(
                fields.model_copy(update={"messages": latest}), server, exchange
            )
            high = middle
        except ContextLengthExceeded:
            if low == high:
                raise
            low = middle + 1
    return fitting
