"""From the bytes of a body to a validated request, with every way it can be wrong as a 400."""

from __future__ import annotations

import asyncio
from typing import Any, TypeVar

import msgspec
from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from service.api.errors import invalid
from service.api.exchange import exchange_of
from service.api.server import server_of
from service.errors import InvalidRequest, UnsupportedMediaType

OFF_LOOP_BYTES = 1 << 18  # parsing and validating more than this would hold every stream up

Model = TypeVar("Model", bound=BaseModel)


async def read_body(request: Request, model: type[Model]) -> Model:
    """Raises ``UnsupportedMediaType``, ``RequestTooLarge``, ``Overloaded``, ``InvalidRequest``."""
    require_json(request.headers.get("content-type"))
    body = b"".join([piece async for piece in request.stream()])  # which keeps no copy
    server_of(request).gate.enter(exchange_of(request.scope))
    if len(body) > OFF_LOOP_BYTES:
        return await asyncio.to_thread(parse, body, model)
    return parse(body, model)


def require_json(content_type: str | None) -> None:
    """Browsers send other types across origins unasked, so nothing but JSON is taken."""
    kind = (content_type or "").partition(";")[0].strip().lower()
    if kind != "application/json" and not (
        kind.startswith("application/") and kind.endswith("+json")
    ):
        raise UnsupportedMediaType("The body must be JSON: send 'Content-Type: application/json'.")


def parse(body: bytes, model: type[Model]) -> Model:
    values = parse_json(body)
    if not isinstance(values, dict):
        raise InvalidRequest("The body must be a JSON object.")
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise invalid(error, values) from None


def parse_json(body: bytes) -> Any:
    """Strict JSON: no NaN, no Infinity, no lone surrogates, no endless nesting."""
    if not body:
        raise InvalidRequest("The body is empty: send a JSON object.")
    try:
        return msgspec.json.decode(body)
    except RecursionError:
        raise InvalidRequest("The JSON is nested too deeply.") from None
    except UnicodeDecodeError:
        raise InvalidRequest("The body is not valid JSON: it is not UTF-8.") from None
    except msgspec.MsgspecError as error:
        raise InvalidRequest(f"The body is not valid JSON: {error}") from None
