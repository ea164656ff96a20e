"""``GET /v1/models`` and ``/v1/models/{id}``, whose ids may hold slashes."""

from __future__ import annotations

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from service.api.exchange import exchange_of
from service.api.openapi import documented
from service.api.schemas.models import ModelCard, ModelList
from service.api.server import server_of
from service.registry import ServedAdapter, ServedModel

router = APIRouter()


def json_response(answer: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(answer), media_type="application/json")


@router.get("/v1/models", **documented(None, ModelList))
async def list_models(request: Request) -> Response:
    """Every name this server answers the key to: models, adapters with the model they adapt."""
    models, allowed = server_of(request).models, exchange_of(request.scope).caller.models
    cards = [card(name, model) for name, model in models.names()]
    cards += [adapter_card(adapter, model) for adapter, model in models.adapters()]
    return json_response(ModelList(data=[c for c in cards if allowed is None or c.id in allowed]))


@router.get("/v1/models/{model_id:path}", **documented(None, ModelCard))
async def retrieve_model(request: Request, model_id: str) -> Response:
    """One model's card, or an adapter's."""
    allowed = exchange_of(request.scope).caller.models
    model, adapter = server_of(request).models.find(model_id, allowed)
    found = card(model_id, model) if adapter is None else adapter_card(adapter, model)
    return json_response(found)


def card(name: str, model: ServedModel) -> ModelCard:
    length = None if model.tokenizer is None else model.context
    return ModelCard(id=name, created=model.created, root=model.name, max_model_len=length)


def adapter_card(adapter: ServedAdapter, model: ServedModel) -> ModelCard:
    """``root`` is its folder's own name: paths are nobody's business."""
    found = card(adapter.name, model)
    found.created, found.root, found.parent = adapter.created, adapter.folder.name, model.name
    return found
