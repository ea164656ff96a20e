"""A request for a message, as a chat: blocks to messages, Anthropic's words to OpenAI's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from service.api.conversation import Chat, prepare
from service.api.exchange import Exchange
from service.api.schemas.messages import (
    ConversationFields,
    CountRequest,
    CustomTool,
    InputBlock,
    MessagesRequest,
    TextBlock,
    Texts,
    Thinking,
    ToolResult,
    ToolUse,
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
from service.errors import InvalidRequest

NAMES: Names = (
    (r"\bmessages\[\d+\][\w.\[\]]*", "messages"),
    (r", or truncate_prompt_tokens\b", ""),
    (r"\bstop(?=\[|:|$)", "stop_sequences"),
    (r"\breasoning_effort\b", "output_config.effort"),
    (r"\bresponse_format(\.json_schema)?\b", "output_config.format"),
    (r"(\btools\[\d+\])\.function\.parameters\b", r"\1.input_schema"),
    (r"(\btools\[\d+\])\.function\b", r"\1"),
    (r"\btool_choice\.function\b", "tool_choice"),
)
EFFORTS = {"max": "xhigh"}  # the most that chat's word knows
CHOICES = {"auto": "auto", "any": "required", "none": "none"}


async def prepare_message(request: MessagesRequest, server: Server, exchange: Exchange) -> Chat:
    values = _conversation(request) | _generation(request)
    with in_words_of(NAMES):
        fields = to_chat(request, values)
        return renamed(await prepare(fields, server, exchange), NAMES)


async def count_tokens(request: CountRequest, server: Server, exchange: Exchange) -> int:
    values = _conversation(request)
    with in_words_of(NAMES):
        return await count_prompt(to_chat(request, values), server, exchange)


def _generation(request: MessagesRequest) -> dict[str, Any]:
    return {
        "max_tokens": request.max_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": request.top_k,
        "stop": request.stop_sequences or None,
        "stream": request.stream,
        "user": request.metadata and request.metadata.user_id,
        "service_tier": request.service_tier,
    }


def _conversation(request: ConversationFields) -> dict[str, Any]:
    """An answer goes on with the assistant's own last message, where that is the last one."""
    messages = list(_messages(request))
    continues = messages[-1]["role"] == "assistant" and "tool_calls" not in messages[-1]
    return {
        "model": request.model,
        "messages": messages,
        "continue_final_message": True if continues else None,
        **_tools(request),
        **_thinking(request),
        "response_format": _response_format(request),
    }


def _response_format(request: ConversationFields) -> dict[str, Any] | None:
    wanted = request.output_config and request.output_config.format
    if not wanted:
        return None
    schema = {"name": "answer", "schema": wanted.schema_, "strict": True}
    return {"type": "json_schema", "json_schema": schema}


def _thinking(request: ConversationFields) -> dict[str, Any]:
    """Templates of models that can leave it out ask for ``enable_thinking``."""
    values: dict[str, Any] = {}
    if request.thinking is not None:
        wanted = request.thinking.type != "disabled"
        values["chat_template_kwargs"] = {"enable_thinking": wanted}
    if request.output_config is not None and (effort := request.output_config.effort):
        values["reasoning_effort"] = EFFORTS.get(effort, effort)
    return values


def _tools(request: ConversationFields) -> dict[str, Any]:
    choice = request.tool_choice
    translated: Any = None
    if choice is not None and choice.type == "tool":
        if choice.name is None:
            raise InvalidRequest("tool_choice.name: is required", param="tool_choice.name")
        translated = named_choice(choice.name)
    elif choice is not None:
        translated = CHOICES[choice.type]
    if not request.tools:
        return {} if translated in ("auto", "none") else {"tool_choice": translated}
    single = choice is not None and choice.disable_parallel_tool_use
    return {
        "tools": [_function_tool(tool) for tool in request.tools],
        "tool_choice": translated,
        "parallel_tool_calls": False if single else None,
    }


def _function_tool(tool: CustomTool) -> dict[str, Any]:
    return function_tool(tool.name, description=tool.description, parameters=tool.input_schema)


def _messages(request: ConversationFields) -> list[Message]:
    messages: list[Message] = []
    if request.system:
        messages.append({"role": "system", "content": text_of(request.system)})
    called: dict[str, str] = {}  # ids to tools' names
    for index, message in enumerate(request.messages):
        path = f"messages[{index}].content"
        if isinstance(message.content, str):
            messages.append({"role": message.role, "content": message.content})
        elif message.role == "assistant":
            messages.append(_assistant_turn(message.content, called, path))
        else:
            messages += _other_turn(message.role, message.content, called, path)
    return merge_systems(messages)


def _assistant_turn(blocks: list[InputBlock], called: dict[str, str], path: str) -> Message:
    texts, thoughts, calls = [], [], []
    for index, block in enumerate(blocks):
        if isinstance(block, TextBlock):
            texts.append(block.text)
        elif isinstance(block, Thinking):
            thoughts.append(block.thinking)
        elif isinstance(block, ToolUse):
            called[block.id] = block.name
            arguments = msgspec.json.encode(block.input).decode()
            calls.append(call(block.id, block.name, arguments))
        elif isinstance(block, ToolResult):
            raise _misplaced(f"{path}[{index}]", "a tool_result belongs into a message of the user")
    turn: Message = {"role": "assistant"}
    if thoughts:
        turn["reasoning_content"] = "".join(thoughts)
    if texts or not calls:
        turn["content"] = "".join(texts)
    if calls:
        turn["tool_calls"] = calls
    return turn


def _other_turn(
    role: str, blocks: list[InputBlock], called: dict[str, str], path: str
) -> Iterator[Message]:
    """Results of tools are messages of their own; the texts between them too."""
    texts: list[str] = []
    for index, block in enumerate(blocks):
        if isinstance(block, TextBlock):
            texts.append(block.text)
        elif isinstance(block, ToolResult) and role == "user":
            if texts:
                yield {"role": role, "content": "\n".join(texts)}
                texts = []
            yield _result(block, called, f"{path}[{index}]")
        else:
            raise _misplaced(f"{path}[{index}]", f"a {block.type} is nothing a {role} says")
    if texts or not blocks:
        yield {"role": role, "content": "\n".join(texts)}


def _result(block: ToolResult, called: dict[str, str], path: str) -> Message:
    name = called.get(block.tool_use_id)
    if name is None:
        raise _misplaced(f"{path}.tool_use_id", "no tool_use before it has this id")
    text = text_of(block.content or "")
    if block.is_error:
        text = f"Error: {text}"  # chat has no other way to say so
    return {"role": "tool", "tool_call_id": block.tool_use_id, "name": name, "content": text}


def _misplaced(path: str, reason: str) -> InvalidRequest:
    return InvalidRequest(f"{path}: {reason}", param=path)


def text_of(content: str | Texts) -> str:
    """Blocks as one text, a line each, as chat joins parts."""
    return content if isinstance(content, str) else "\n".join(block.text for block in content)
