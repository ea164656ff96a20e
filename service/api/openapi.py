"""The OpenAPI page. Routes read bodies themselves, so they say here what they take and give."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from service import __version__
from service.api.anthropic_errors import OVERLOADED, AnthropicEnvelope
from service.api.authentication import PUBLIC_PATHS
from service.api.errors import ErrorEnvelope
from service.api.schemas.adapters import LoadAdapterRequest, UnloadAdapterRequest
from service.api.schemas.chat import ChatChunk, ChatCompletion, ChatRequest
from service.api.schemas.completions import Completion, CompletionRequest
from service.api.schemas.estimate import Estimate
from service.api.schemas.messages import (
    CountRequest,
    MessageAnswer,
    MessageEvent,
    MessagesRequest,
    TokenCount,
)
from service.api.schemas.models import ModelCard, ModelList
from service.api.schemas.pooling import (
    EmbeddingList,
    EmbeddingRequest,
    Ranking,
    RerankRequest,
    ScoreList,
    ScoreRequest,
)
from service.api.schemas.response_events import InputTokens, ModelResponse, ResponseEvent
from service.api.schemas.responses import ResponseRequest
from service.api.schemas.tokens import Detokenized, DetokenizeRequest, Tokenized, TokenizeRequest

COMPONENT = "#/components/schemas/{}"
REQUESTS: list[type[BaseModel]] = [
    CompletionRequest,
    ChatRequest,
    ResponseRequest,
    MessagesRequest,
    CountRequest,
    EmbeddingRequest,
    ScoreRequest,
    RerankRequest,
    TokenizeRequest,
    DetokenizeRequest,
    LoadAdapterRequest,
    UnloadAdapterRequest,
]
ANSWERS = [
    Completion,
    ChatCompletion,
    ChatChunk,
    ModelResponse,
    ResponseEvent,
    InputTokens,
    MessageAnswer,
    MessageEvent,
    TokenCount,
    EmbeddingList,
    ScoreList,
    Ranking,
    Estimate,
    ModelCard,
    ModelList,
    Tokenized,
    Detokenized,
    ErrorEnvelope,
    AnthropicEnvelope,
]
EVENT: dict[str, Any] = {  # of a stream each, as readers of pages take a stream's schema
    "type": "object",
    "properties": {"data": {"type": "string", "description": "A chunk's JSON, or [DONE]"}},
    "required": ["data"],
}
SCHEMES = {  # where the server has keys; without any nothing is asked for
    "bearer": {"type": "http", "scheme": "bearer"},
    "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
}
ERRORS = {
    400: "A field is wrong, out of bounds or not supported yet",
    401: "No API key, or a wrong one",
    403: "The key, or the server, does not allow this",
    404: "No such model",
    408: "The body took too long",
    413: "The body is too large",
    415: "The body is not JSON",
    429: "The queue is full, or the key over its rate or quota; see Retry-After",
    500: "The engine failed on this request",
    503: "Loading, draining or restarting; see Retry-After",
}


def _json(schema: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": COMPONENT.format(schema)}}}


def documented(
    request: type[BaseModel] | None,
    answer: type[msgspec.Struct] | None,
    *,
    streams: bool = False,
    anthropic: bool = False,
    others: tuple[type[BaseModel], ...] = (),
) -> dict[str, Any]:
    """Arguments of a route: its body, its answer (None: a line of text), errors in one envelope.

    ``others`` are bodies it takes as well.
    """
    text = {"text/plain": {"schema": {"type": "string"}}}
    content = text if answer is None else _json(answer.__name__)
    if streams:
        content["text/event-stream"] = {"schema": EVENT}
    statuses = ERRORS if request is not None else {s: ERRORS[s] for s in (401, 403, 404, 503)}
    if anthropic:
        statuses = statuses | {OVERLOADED: ERRORS[429]}
    failed = _json((AnthropicEnvelope if anthropic else ErrorEnvelope).__name__)
    responses: dict[int | str, dict[str, Any]] = {
        200: {"description": "The answer", "content": content}
    }
    for status, description in statuses.items():
        responses[status] = {"description": description, "content": failed}
    extra: dict[str, Any] = {}
    if others:
        bodies = [{"$ref": COMPONENT.format(one.__name__)} for one in (request, *others) if one]
        body = {"application/json": {"schema": {"anyOf": bodies}}}
        extra["requestBody"] = {"required": True, "content": body}
    elif request is not None:
        extra["requestBody"] = {"required": True, "content": _json(request.__name__)}
    return {"responses": responses, "openapi_extra": extra, "response_model": None}


def stated(answer: type[msgspec.Struct], *, may_fail: bool = False) -> dict[str, Any]:
    """Arguments of a route that tells how the server is, with 503 in the same shape if it is not.

    ``answer`` holds plain values only.
    """
    _, components = msgspec.json.schema_components([answer])
    content = {"application/json": {"schema": components[answer.__name__]}}
    responses: dict[int | str, dict[str, Any]] = {200: {"description": "It is", "content": content}}
    if may_fail:
        responses[503] = {"description": "It is not; see Retry-After", "content": content}
    return {"responses": responses, "response_model": None}


def describe(app: FastAPI) -> dict[str, Any]:
    """The whole page, with the schemas of requests (pydantic) and answers (msgspec)."""
    page = get_openapi(
        title="pronk",
        version=__version__,
        description="Llama-family models over HTTP, OpenAI-compatible.",
        routes=app.routes,
    )
    _, requests = models_json_schema(
        [(model, "validation") for model in REQUESTS], ref_template=COMPONENT.format("{model}")
    )
    _, answers = msgspec.json.schema_components(ANSWERS, ref_template=COMPONENT.format("{name}"))
    schemas = page.setdefault("components", {}).setdefault("schemas", {})
    assert not requests["$defs"].keys() & answers.keys(), "two schemas of one name"
    schemas.update(requests["$defs"])
    schemas.update(answers)
    _leave_out_validation(page)
    _say_where_keys_go(page)
    return page


def _say_where_keys_go(page: dict[str, Any]) -> None:
    refused = {"description": ERRORS[401], "content": _json(ErrorEnvelope.__name__)}
    page["components"]["securitySchemes"] = SCHEMES
    for path, operations in page["paths"].items():
        for operation in operations.values() if path not in PUBLIC_PATHS else ():
            operation["security"] = [{name: []} for name in SCHEMES] + [{}]  # {}: may be without
            operation["responses"].setdefault("401", refused)


def _leave_out_validation(page: dict[str, Any]) -> None:
    """FastAPI's own 422: bodies and paths are read by the routes, which answer 400 and 404."""
    for path in page["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        page["components"]["schemas"].pop(name, None)
