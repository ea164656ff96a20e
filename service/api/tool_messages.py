"""Histories with calls in them, as chat templates read them, those that know no tools as well."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from service.api.dialects import MISTRAL, Dialect
from service.api.readers.json_text import parse_arguments
from service.api.readers.mistral import ID_LENGTH
from service.api.schemas.chat import Message


def template_messages(
    messages: Sequence[Message], dialect: Dialect, *, arguments_as_text: bool = False
) -> list[dict[str, Any]]:
    """Arguments are objects unless the template writes them as they are; where the dialect is
    Mistral's, ids are as short as its templates want them."""
    values = [message.for_template() for message in messages]
    for message in values:
        for call in message.get("tool_calls", ()):
            if not arguments_as_text:
                call["function"]["arguments"] = parse_arguments(call["function"]["arguments"])
            if dialect is MISTRAL and "id" in call:
                call["id"] = short_id(call["id"])
        if dialect is MISTRAL and "tool_call_id" in message:
            message["tool_call_id"] = short_id(message["tool_call_id"])
    return values


def short_id(call_id: str) -> str:
    if len(call_id) == ID_LENGTH and call_id.isascii() and call_id.isalnum():
        return call_id
    return hashlib.sha256(call_id.encode("utf-8", "replace")).hexdigest()[:ID_LENGTH]


def plain_messages(
    messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]], dialect: Dialect
) -> list[dict[str, Any]]:
    """For a template that knows no tools: they stand in the system message, calls in the
    assistant's text, results in messages of the user."""
    told: list[dict[str, Any]] = []
    for message in messages:
        plain = _plain(message, dialect)
        is_result = message["role"] == "tool"
        if is_result and told and told[-1].get("is_result"):
            told[-1]["content"] += "\n" + plain["content"]
        else:
            told.append({**plain, "is_result": True} if is_result else plain)
    told = [{k: v for k, v in message.items() if k != "is_result"} for message in told]
    return _with_system(told, dialect.prompt(tools)) if tools else told


def _plain(message: dict[str, Any], dialect: Dialect) -> dict[str, Any]:
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{_text(message)}\n</tool_response>"}
    if not message.get("tool_calls"):
        return message
    calls = [
        dialect.write_call(call["function"]["name"], _as_json(call["function"]["arguments"]))
        for call in message["tool_calls"]
    ]
    kept = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**kept, "content": "\n".join(filter(None, [_text(message), *calls]))}


def _with_system(messages: list[dict[str, Any]], prompt: str) -> list[dict[str, Any]]:
    if messages and messages[0]["role"] == "system":
        first = {**messages[0], "content": f"{_text(messages[0])}\n\n{prompt}"}
        return [first, *messages[1:]]
    return [{"role": "system", "content": prompt}, *messages]


def _text(message: dict[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, list):
        return "\n".join(part["text"] for part in content)
    return content or ""


def _as_json(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
