"""What a request asks for and does not get: said in a header, refused under ``strict``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from urllib.parse import quote

from pydantic import BaseModel

from service.errors import InvalidRequest, NotSupported

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


def ignored_headers(request: BaseModel, strict: bool, also: Sequence[str] = ()) -> dict[str, str]:
    """The header that names them, and ``also`` what is known but not done. Raises
    ``InvalidRequest`` where nothing may be ignored."""
    names = [quote(name[:LONGEST_NAME], safe="") for name in also[:MOST_NAMED]]
    for name in unknown_fields(request):
        if len(names) == MOST_NAMED:
            break
        names.append(name)
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


HARMLESS = {
    "functions": ([],),
    "function_call": ("none",),
}
OLDER = {"functions": "tools", "function_call": "tool_choice"}  # and what to send instead


def refuse_unsupported(request: BaseModel) -> None:
    """Raises ``NotSupported`` for fields that newer ones have replaced."""
    for name, newer in OLDER.items():
        value = getattr(request, name, None)
        if value is not None and value not in HARMLESS[name]:
            raise NotSupported(f"{name}: send {newer}, which replaced it.", param=name)
