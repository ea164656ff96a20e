"""What the requests that are translated to chat share: pronk's own fields, and kinds of items."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Discriminator, Field

from service.api.schemas.sampling import INT64, Fields


class OwnFields(Fields):
    """They mean what they mean in chat, and are handed on under the same name."""

    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-INT64, lt=INT64)] | None = None
    priority: Annotated[int, Field(ge=-INT64, lt=INT64)] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    deadline_ms: Annotated[int, Field(gt=0, lt=INT64)] | None = None
    max_queue_ms: Annotated[int, Field(gt=0, lt=INT64)] | None = None
    strict: bool | None = None


def by_type(message: str, *, default: str = "") -> Discriminator:
    """Tells members of a union by their ``type``; other types are refused with ``message``."""

    def read(value: Any) -> str:
        found = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
        if found is None:
            return default
        return found if isinstance(found, str) else ""

    return Discriminator(read, custom_error_type="unknown_type", custom_error_message=message)
