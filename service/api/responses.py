"""``POST /v1/responses``: stateless, a translation upon chat."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from service.api.body import read_body
from service.api.exchange import exchange_of
from service.api.models import json_response
from service.api.openapi import documented
from service.api.response_input import count_tokens, ignored, prepare_response, refuse_state
from service.api.response_shape import ResponseShape
from service.api.schemas.response_events import InputTokens, ModelResponse
from service.api.schemas.responses import ResponseRequest
from service.api.server import server_of
from service.api.stream import AnswerResponse, Framing, StreamUsage, named_frame
from service.api.translation import in_words_of
from service.errors import NotFound

router = APIRouter()
TOOL_NAMES = ((r"(\btools\[\d+\])\.function\b", r"\1"),)


@router.post("/v1/responses", **documented(ResponseRequest, ModelResponse, streams=True))
async def create_response(request: Request) -> Response:
    """Answer a conversation as a response of items, whole or as named events; nothing is stored."""
    server = server_of(request)
    exchange = server.receive(request)
    fields = await _read(request)
    refuse_state(fields)
    headers = ignored(fields, server)
    chat = await prepare_response(fields, server, exchange)
    shape = ResponseShape(fields, chat)
    return AnswerResponse(
        chat.job,
        shape,
        metrics=server.metrics,
        exchange=exchange,
        stream=StreamUsage(at_end=True) if fields.stream else None,
        ping_interval=server.settings.ping_interval,
        headers=chat.headers | headers,
        framing=Framing(named_frame, shape.failure, end=b""),
    )


@router.post("/v1/responses/input_tokens", **documented(ResponseRequest, InputTokens))
async def count_input_tokens(request: Request) -> Response:
    """How many tokens the input of a response is."""
    server = server_of(request)
    fields = await _read(request)
    refuse_state(fields)
    headers = ignored(fields, server)
    counted = await count_tokens(fields, server, exchange_of(request.scope))
    response = json_response(InputTokens(counted))
    response.headers.update(headers)
    return response


async def _read(request: Request) -> ResponseRequest:
    """A tool in chat's shape is told where its fields belong here."""
    with in_words_of(TOOL_NAMES):
        return await read_body(request, ResponseRequest)


@router.get("/v1/responses/{response_id}", **documented(None, ModelResponse))
async def retrieve_response(response_id: str) -> Response:
    """404: nothing is stored."""
    raise _not_stored()


@router.delete("/v1/responses/{response_id}", **documented(None, ModelResponse))
async def delete_response(response_id: str) -> Response:
    """404: nothing is stored."""
    raise _not_stored()


def _not_stored() -> NotFound:
    return NotFound("This server stores no responses: what it answered is gone once it was sent.")
