"""What a request asks for and does not get: said in a header, refused under ``strict``."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import quote

from pydantic import BaseModel

from service.errors import InvalidRequest, NotSupportedYet

HEADER = "X-Ignored-Params"
MOST_NAMED = 20
LONGEST_NAME = 100  # characters of one step of a path


def unknown_fields(request: BaseModel, prefix: str = "") -> Iterator[str]:
    """Paths of fields no schema knows, nested ones too; names percent-encoded, null is absent."""
    for name, value in (request.model_extra or {}).items():
        if value is not None:
            yield prefix + quote(name[:LONGEST_NAME], safe="")
    for name in type(request).model_fields:
        value = getattr(request, name)
        if isinstance(value, BaseModel):
            yield from unknown_fields(value, f"{prefix}{name}.")
        elif isinstance(value, list):
            for index, item in enumerate(value):
                if not isinstance(item, BaseModel):
                    break
                yield from unknown_fields(item, f"{prefix}{name}[{index}].")


def ignored_headers(request: BaseModel, strict: bool) -> dict[str, str]:
    """The header that names them. Raises ``InvalidRequest`` where nothing may be ignored."""
    names = []
    for name in unknown_fields(request):
        names.append(name)
        if len(names) == MOST_NAMED:
            break
    if getattr(request, "store", None):
        names = ["store", *names][:MOST_NAMED]
    if not names:
        return {}
    if strict or getattr(request, "strict", None):
        listed = ", ".join(names)
        raise InvalidRequest(
            f"This server would ignore: {listed}. Leave them out, or send without strict.",
            param=names[0],
            code="unknown_parameter",
        )
    return {HEADER: ", ".join(names)}


NOT_YET = {
    "tools": "tool calling",
    "tool_choice": "tool calling",
    "parallel_tool_calls": "tool calling",
    "functions": "tool calling",
    "function_call": "tool calling",
    "structured_outputs": "structured output",
    "guided_json": "structured output",
    "guided_regex": "structured output",
    "guided_choice": "structured output",
    "guided_grammar": "structured output",
}
HARMLESS = {"tool_choice": ("none",)}


def refuse_unsupported(request: BaseModel) -> None:
    """Raises ``NotSupportedYet`` for what the wire knows and this version does not serve."""
    for name, feature in NOT_YET.items():
        value = getattr(request, name, None)
        if value is not None and value not in HARMLESS.get(name, ()):
            raise _not_yet(name, feature)
    response_format = getattr(request, "response_format", None)
    if response_format is not None and response_format.type != "text":
        raise _not_yet("response_format", f"response_format {response_format.type}")


def _not_yet(name: str, feature: str) -> NotSupportedYet:
    return NotSupportedYet(
        f"{name}: this version of pronk does not support {feature} yet; leave the field out.",
        param=name,
    )
