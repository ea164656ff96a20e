"""The error envelope: every failure of every route leaves through here, whatever its dialect."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec import Struct
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Scope

from service.api.anthropic_errors import (
    anthropic_envelope,
    anthropic_status,
    speaks_anthropic,
)
from service.api.exchange import exchange_of, route_path
from service.errors import (
    AuthenticationFailed,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    PronkError,
    RateLimited,
    RequestTooLarge,
)
from service.redaction import Redacted

LONGEST_WAIT = 60.0  # seconds; their clients take no longer ones for meant
LONGEST_PARAM = 200  # characters of a path that are echoed
MISSING = object()
MESSAGES = {  # where pydantic's own speak of Python
    "missing": "is required",
    "dict_type": "Input should be a JSON object",
    "model_type": "Input should be a JSON object",
}


class ErrorBody(Redacted, Struct):
    """``code`` is a string or null, as OpenAI has it; the four keys are always there."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorEnvelope(Redacted, Struct):
    error: ErrorBody


class RequestTimeout(InvalidRequest):
    """The client took too long over its body."""

    status = 408
    code = "request_timeout"


def envelope(error: PronkError) -> ErrorEnvelope:
    param = error.param[:LONGEST_PARAM] if error.param else error.param
    return ErrorEnvelope(ErrorBody(error.message, error.type, param, error.code))


def error_response(
    error: PronkError, scope: Scope, headers: Mapping[str, str] | None = None
) -> Response:
    """The envelope of the route's dialect, with its status and the headers that belong to it."""
    extra = dict(headers or {})
    if error.retry_after is not None:
        extra["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    if isinstance(error, RateLimited):
        extra |= patience(error)
    if isinstance(error, AuthenticationFailed):
        extra["WWW-Authenticate"] = "Bearer"
    content: Struct = envelope(error)
    status = error.status
    if speaks_anthropic(route_path(scope)):
        status = anthropic_status(error)
        content = anthropic_envelope(error, exchange_of(scope).request_id)
    return Response(msgspec.json.encode(content), status, extra, media_type="application/json")


def patience(error: RateLimited) -> dict[str, str]:
    """For OpenAI's and Anthropic's clients, which by themselves try again whatever is refused."""
    if error.retry_after is None or error.retry_after > LONGEST_WAIT:
        return {"X-Should-Retry": "false"}
    return {"Retry-After-Ms": str(math.ceil(error.retry_after * 1000))}


def internal_error() -> PronkError:
    return PronkError("The server failed on this request; the failure was logged.")


async def handle_pronk_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, PronkError)
    return error_response(error, request.scope)


async def handle_http_exception(request: Request, error: Exception) -> Response:
    """What the router itself refuses: unknown routes and methods."""
    assert isinstance(error, HTTPException)
    return error_response(_translate(error), request.scope, error.headers)


def _translate(error: HTTPException) -> PronkError:
    match error.status_code:
        case 404:
            return NotFound("There is nothing at this address.")
        case 405:
            allowed = (error.headers or {}).get("Allow", "")
            return MethodNotAllowed(f"This method is not allowed here; allowed: {allowed}")
        case 413:
            return RequestTooLarge("The request body is too large.")
        case status if status < 500:
            refused = InvalidRequest("The request could not be read.")
            refused.status = status
            return refused
    return internal_error()


def invalid(error: ValidationError, body: Any) -> InvalidRequest:
    """The deepest of pydantic's complaints: in a union the others speak of types not meant."""
    problems = error.errors(include_url=False, include_input=False)
    paths = [_address(problem["loc"], body, problem["type"] == "missing") for problem in problems]
    deepest = max(range(len(problems)), key=lambda i: (len(paths[i]), _is_meant(problems[i]), -i))
    path = path_text(paths[deepest])
    message = MESSAGES.get(problems[deepest]["type"], problems[deepest]["msg"])
    return InvalidRequest(f"{path}: {message}" if path else message, param=path or None)


def _is_meant(problem: ErrorDetails) -> bool:
    """Whether the value had the type that was expected, so that this complaint fits it."""
    return not problem["type"].endswith("_type")


def _address(location: tuple[int | str, ...], body: Any, is_missing: bool) -> list[int | str]:
    """``location`` without pydantic's names of union members: only what leads into ``body``."""
    path: list[int | str] = []
    for position, step in enumerate(location):
        child = _child(body, step)
        if child is not MISSING or (is_missing and position == len(location) - 1):
            path.append(step)
            body = child
    return path


def _child(body: Any, step: int | str) -> Any:
    if isinstance(body, dict):
        return body.get(step, MISSING)
    if isinstance(body, list) and isinstance(step, int) and step < len(body):
        return body[step]
    return MISSING


def path_text(path: list[int | str]) -> str:
    """``["messages", 0, "role"]`` as ``messages[0].role``."""
    text = ""
    for step in path:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
    return text
