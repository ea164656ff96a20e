"""``GET /v1/models`` and ``/v1/models/{id}``, whose ids may hold slashes."""

from __future__ import annotations

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from service.api.openapi import documented
from service.api.schemas.models import ModelCard, ModelList
from service.api.server import server_of
from service.registry import ServedModel

router = APIRouter()


def json_response(answer: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(answer), media_type="application/json")


@router.get("/v1/models", **documented(None, ModelList))
async def list_models(request: Request) -> Response:
    """Every name this server answers to."""
    names = server_of(request).models.names()
    return json_response(ModelList(data=[card(name, model) for name, model in names]))


@router.get("/v1/models/{model_id:path}", **documented(None, ModelCard))
async def retrieve_model(request: Request, model_id: str) -> Response:
    """One model's card."""
    return json_response(card(model_id, server_of(request).models.get(model_id)))


def card(name: str, model: ServedModel) -> ModelCard:
    length = None if model.tokenizer is None else model.context
    return ModelCard(id=name, created=model.created, root=model.name, max_model_len=length)
