"""Requests that speak of conversations in other words than chat's: to chat's, and errors back."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from service.api.conversation import Chat, read_conversation
from service.api.errors import invalid
from service.api.exchange import Exchange
from service.api.ignored import refuse_unsupported
from service.api.schemas.chat import ChatRequest
from service.api.schemas.translated import OwnFields
from service.api.server import Server
from service.api.tools import read_plan
from service.errors import InvalidRequest

Names = Sequence[tuple[str, str]]  # regular expression of chat's words, and the request's own
Message = dict[str, Any]  # as chat's requests have them


def to_chat(request: OwnFields, values: dict[str, Any]) -> ChatRequest:
    """``values`` in chat's words, and pronk's own fields as they came."""
    own = {name: getattr(request, name) for name in OwnFields.model_fields}
    given = {name: value for name, value in (own | values).items() if value is not None}
    try:
        return ChatRequest.model_validate(given)
    except ValidationError as error:
        raise invalid(error, given) from None


async def count_prompt(fields: ChatRequest, server: Server, exchange: Exchange) -> int:
    """Tokens of the prompt a request would become; it need not fit."""
    refuse_unsupported(fields)
    model = server.models.get(fields.model, exchange.caller.models)
    if model.tokenizer is None:
        raise model.unavailable()
    return len(await read_conversation(fields, server, model, read_plan(fields)))


@contextmanager
def in_words_of(names: Names) -> Iterator[None]:
    """Refusals of a translated request name the fields that came."""
    try:
        yield
    except InvalidRequest as error:
        error.message = _rename(error.message, names)
        error.param = _rename(error.param, names) if error.param else None
        raise


def renamed(chat: Chat, names: Names) -> Chat:
    """What is found out later about its grammar names the field that came, too."""
    if chat.job.grammar_param is None:
        return chat
    param = _rename(chat.job.grammar_param, names)
    return replace(chat, job=replace(chat.job, grammar_param=param))


def _rename(text: str, names: Names) -> str:
    for pattern, name in names:
        text = re.sub(pattern, name, text)
    return text


def merge_systems(messages: list[Message]) -> list[Message]:
    """What opens a conversation as one system message: many templates look at the first alone."""
    count = 0
    while count < len(messages) and messages[count]["role"] in ("system", "developer"):
        count += 1
    if count < 2:
        return messages
    text = "\n\n".join(message["content"] for message in messages[:count])
    return [{"role": "system", "content": text}, *messages[count:]]


def call(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"id": call_id, "type": "function", "function": function}


def function_tool(name: str, **rest: Any) -> dict[str, Any]:
    given = {key: value for key, value in rest.items() if value is not None}
    return {"type": "function", "function": {"name": name} | given}


def named_choice(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}
