"""The ASGI application: routes, middlewares, error envelope."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response

from service import __version__
from service.api import (
    adapters,
    chat,
    completions,
    embeddings,
    estimate,
    health,
    messages,
    models,
    responses,
    scores,
    tokens,
)
from service.api.errors import handle_http_exception, handle_pronk_error
from service.api.exchange import exchange_of
from service.api.middleware import PUBLIC_PATHS, Authentication, BodyBounds, Edge, OverLimit
from service.api.openapi import describe
from service.api.server import Server, server_of
from service.errors import PronkError
from service.metrics import Metrics
from service.registry import ModelRegistry
from service.settings import Settings

ROUTED = (
    completions,
    chat,
    responses,
    messages,
    embeddings,
    scores,
    estimate,
    models,
    adapters,
    tokens,
    health,
)
REFUSED_ADMISSION = (429, 503)


def create_app(settings: Settings, registry: ModelRegistry) -> FastAPI:
    """The service in front of ``registry``'s engines, which are started and stopped elsewhere.

    ``app.state.draining = True`` turns /readyz to 503 and, without a ``drain_delay``, refuses new
    work at once.
    """
    app = FastAPI(
        title="pronk",
        version=__version__,
        docs_url="/docs" if settings.docs else None,
        redoc_url=None,
        openapi_url="/openapi.json" if settings.docs else None,
        redirect_slashes=False,
    )
    metrics = Metrics(registry)
    Server(settings, registry, metrics, app.state)
    for part in ROUTED:
        app.include_router(part.router)
    app.add_exception_handler(PronkError, _refuse)
    app.add_exception_handler(HTTPException, handle_http_exception)
    _add_middlewares(app, settings, metrics)
    _describe_lazily(app)
    return app


def _add_middlewares(app: FastAPI, settings: Settings, metrics: Metrics) -> None:
    """The last one added is the outermost: edge, connections, CORS, keys, body."""
    keys = [key.get_secret_value() for key in settings.api_key]
    public = PUBLIC_PATHS | ({"/metrics"} if settings.metrics_public else set())
    app.add_middleware(BodyBounds, max_bytes=settings.max_body_bytes, timeout=settings.body_timeout)
    app.add_middleware(Authentication, keys=keys, public=public)
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allowed_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "X-Ignored-Params", "Retry-After"],
        )
    app.add_middleware(OverLimit)
    app.add_middleware(Edge, metrics=metrics)


async def _refuse(request: Request, error: Exception) -> Response:
    """The envelope; refused admissions are counted by their reason."""
    assert isinstance(error, PronkError)
    if exchange_of(request.scope).is_generation and error.status in REFUSED_ADMISSION:
        server = server_of(request)
        server.metrics.reject(server.models.models[0], error.code or "other")
    return await handle_pronk_error(request, error)


def _describe_lazily(app: FastAPI) -> None:
    """OpenAPI's page, made at its first request: a start must be quick."""

    def page() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = describe(app)
        return app.openapi_schema

    app.openapi = page  # type: ignore[method-assign]
