"""Failures as Anthropic's clients read them: whatever goes wrong below ``/v1/messages``."""

from __future__ import annotations

from msgspec import Struct

from service.errors import PronkError
from service.redaction import Redacted

PATH = "/v1/messages"
OVERLOADED = 529  # HTTP has no such status; Anthropic's clients know it, and try again
TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    OVERLOADED: "overloaded_error",
}


class AnthropicError(Redacted, Struct):
    type: str
    message: str


class AnthropicEnvelope(Redacted, Struct, tag_field="type", tag="error"):
    error: AnthropicError
    request_id: str


def speaks_anthropic(path: str) -> bool:
    return path == PATH or path.startswith(f"{PATH}/")


def anthropic_status(error: PronkError) -> int:
    """A full queue is told apart from a caller over its rate."""
    is_overloaded = error.status == 429 and error.type == "overloaded_error"
    return OVERLOADED if is_overloaded else error.status


def anthropic_envelope(error: PronkError, request_id: str) -> AnthropicEnvelope:
    status = anthropic_status(error)
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    return AnthropicEnvelope(AnthropicError(kind, error.message), request_id)
