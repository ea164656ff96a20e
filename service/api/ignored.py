"""What a request asks for and does not get: said in a header, refused under ``strict``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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


NOT_YET = {
    "suffix": "filling in the middle",
    "use_beam_search": "beam search",
}
HARMLESS = {
    "suffix": ("",),
    "use_beam_search": (False,),
    "functions": ([],),
    "function_call": ("none",),
}
OLDER = {"functions": "tools", "function_call": "tool_choice"}  # and what to send instead


def refuse_unsupported(request: BaseModel) -> None:
    """Raises ``NotSupportedYet`` for what the wire knows and this version does not serve."""
    for name, newer in OLDER.items():
        value = getattr(request, name, None)
        if value is not None and value not in HARMLESS[name]:
            raise NotSupportedYet(f"{name}: send {newer}, which replaced it.", param=name)
    for name, feature in NOT_YET.items():
        value = getattr(request, name, None)
        if value is not None and value not in HARMLESS.get(name, ()):
            raise _not_yet(name, feature)
    if getattr(request, "length_penalty", None) not in (None, 1):
        raise _not_yet("length_penalty", "beam search")


def _not_yet(name: str, feature: str) -> NotSupportedYet:
    return NotSupportedYet(
        f"{name}: this version of pronk does not support {feature} yet; leave the field out.",
        param=name,
    )
