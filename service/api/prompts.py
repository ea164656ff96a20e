"""From what clients write to token ids: chat templates, tokenizing, truncation.

Long texts are encoded in a thread, so that streams go on meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from model.chat_template import ChatTemplate, ChatTemplateError
from model.tokenizer import TextNotEncodable
from service.api.dialects import dialect_of
from service.api.schemas.chat import Message, TemplateFields
from service.api.schemas.tools import Tool
from service.api.tool_messages import plain_messages, template_messages
from service.api.tools import num_characters
from service.errors import InvalidRequest, PermissionDenied

if TYPE_CHECKING:
    from model.tokenizer import Tokenizer
    from service.registry import ServedModel

OFF_LOOP_CHARACTERS = 4096

Result = TypeVar("Result")


async def off_loop(size: int, work: Callable[[], Result]) -> Result:
    """In a thread when ``size`` (characters or ids) says that it would take long."""
    if size > OFF_LOOP_CHARACTERS:
        return await asyncio.to_thread(work)
    return work()


def encode(text: str, tokenizer: Tokenizer, *, special: bool, parse: bool) -> list[int]:
    """Raises ``InvalidRequest`` for text that has no UTF-8 form."""
    try:
        return tokenizer.encode(text, add_special_tokens=special, parse_special=parse)
    except TextNotEncodable as error:
        raise InvalidRequest(str(error), param="prompt") from None


def truncate(ids: list[int], length: int | None, side: str | None) -> list[int]:
    """The last ``length`` ids, or the first where the right side is cut; None keeps all."""
    if length is None or len(ids) <= length:
        return ids
    return ids[:length] if side == "right" else ids[-length:]


def check_messages(messages: list[Message]) -> None:
    """Raises ``InvalidRequest`` where content is missing and no calls stand in its place."""
    for index, message in enumerate(messages):
        if message.content is None and not (message.tool_calls or message.function_call):
            path = f"messages[{index}].content"
            raise InvalidRequest(f"{path}: may be absent only beside tool_calls", param=path)


def template_for(fields: TemplateFields, model: ServedModel, *, allowed: bool) -> ChatTemplate:
    """The model's template, or the request's own where the operator allows it."""
    if fields.chat_template is not None:
        if not allowed:
            raise PermissionDenied(
                "chat_template: this server does not take templates from requests",
                param="chat_template",
            )
        assert model.tokenizer is not None
        try:
            return ChatTemplate(fields.chat_template, model.tokenizer)
        except ChatTemplateError as error:
            raise InvalidRequest(f"chat_template: {error}", param="chat_template") from None
    if model.chat_template is None:
        raise InvalidRequest(
            f"The model {model.name!r} has no chat template; use /v1/completions.", param="messages"
        )
    return model.chat_template


def wants_generation_prompt(fields: TemplateFields) -> bool:
    """Default: yes, unless the last message is to be continued. Raises where both are asked for."""
    if fields.continue_final_message and fields.add_generation_prompt:
        raise InvalidRequest(
            "continue_final_message: cannot be set together with add_generation_prompt",
            param="continue_final_message",
        )
    if fields.add_generation_prompt is None:
        return not fields.continue_final_message
    return fields.add_generation_prompt


async def encode_chat(
    messages: list[Message],
    fields: TemplateFields,
    model: ServedModel,
    *,
    allow_template: bool,
    add_special_tokens: bool = False,
    extra: dict[str, Any] | None = None,
    tools: Sequence[Tool] = (),
    tool_call_parser: str = "auto",
) -> list[int]:
    """The ids of the templated conversation; special-token text in contents stays text."""
    check_messages(messages)
    template = template_for(fields, model, allowed=allow_template)
    assert model.tokenizer is not None
    dialect = dialect_of(template.source, model.tokenizer, tool_call_parser)
    generation_prompt = wants_generation_prompt(fields)
    kwargs = {**(extra or {}), **(fields.chat_template_kwargs or {})}
    size = sum(len(message.text() or "") for message in messages) + num_characters(tools)

    def render() -> list[int]:
        told = [tool.for_template() for tool in tools]
        said = template_messages(messages, dialect, arguments_as_text=template.quotes_arguments)
        if not template.reads_tools:
            said, told = plain_messages(said, told, dialect), []
        return template.encode(
            said,
            tools=told,
            add_generation_prompt=generation_prompt,
            continue_final_message=bool(fields.continue_final_message),
            kwargs=kwargs,
        )

    try:
        ids = await off_loop(size, render)
    except (ChatTemplateError, TextNotEncodable) as error:
        raise InvalidRequest(str(error), param="messages") from None
    if not ids:
        raise InvalidRequest("The messages render to no token.", param="messages")
    bos = model.tokenizer.bos_id
    return [bos, *ids] if add_special_tokens and bos is not None and ids[0] != bos else ids
