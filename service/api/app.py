"""The ASGI application: routes, middlewares, error envelope."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
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
from service.api.authentication import PUBLIC_PATHS, Authentication
from service.api.errors import handle_http_exception, handle_pronk_error
from service.api.exchange import exchange_of
from service.api.gate import Gate
from service.api.middleware import BodyBounds, Cors, Edge, OverLimit
from service.api.openapi import describe
from service.api.page import PATH, docs
from service.api.rate_limits import LIMIT_HEADERS, RateLimits
from service.api.recorder import Recorder
from service.api.server import Server, server_of
from service.errors import PronkError
from service.keys.history import history_of
from service.keys.keyring import Keyring
from service.keys.limits import Limits
from service.keys.metrics import KeyMetrics
from service.ledger.ledger import Ledger
from service.metrics import Metrics
from service.registry import ModelRegistry
from service.settings import Settings

if TYPE_CHECKING:
    from service.tracing.exporting import Tracing

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
# FastAPI's own (from 0.160 or so) tells any provider it finds the words of exceptions.
NO_TELEMETRY: Any = {"tracing": False, "metrics": False, "logs": False}


def create_app(
    settings: Settings,
    registry: ModelRegistry,
    ledger: Ledger | None = None,
    tracing: Tracing | None = None,
) -> FastAPI:
    """The service in front of ``registry``'s engines, which are started and stopped elsewhere, as
    are ``ledger`` and ``tracing``.

    Raises ``KeysProblem`` where the keys file cannot be used. Whoever runs the app lets
    ``app.state.server.keyring.watch()`` run beside it.
    ``app.state.draining = True`` turns /readyz to 503 and, without a ``drain_delay``, refuses new
    work at once.
    """
    app = FastAPI(
        title="pronk",
        version=__version__,
        docs_url=None,  # with headers of its own: page.py
        redoc_url=None,
        openapi_url="/openapi.json" if settings.docs else None,
        redirect_slashes=False,
        telemetry=NO_TELEMETRY,
    )
    metrics = Metrics(registry, ledger)
    if tracing is not None:
        metrics.watch_traces(tracing.deliveries)
    keyring = Keyring([key.get_secret_value() for key in settings.api_key], settings.api_keys_file)
    limits = Limits(history=history_of(ledger))
    limits.install(keyring.from_file)
    keyring.on_change.append(limits.install)
    key_metrics = KeyMetrics(metrics.registry, keyring)
    gate = Gate(registry, settings.max_queued_requests)
    server = Server(
        settings, registry, metrics, app.state, keyring, limits, key_metrics, gate, ledger
    )
    metrics.watch_drain(app.state)
    for part in ROUTED:
        app.include_router(part.router)
    app.add_exception_handler(PronkError, _refuse)
    app.add_exception_handler(HTTPException, handle_http_exception)
    _add_middlewares(app, server, tracing)
    _describe_lazily(app)
    if settings.docs:
        app.add_route(PATH, docs, include_in_schema=False)
    return app


def _add_middlewares(app: FastAPI, server: Server, tracing: Tracing | None) -> None:
    """The last one added is the outermost: edge, connections, CORS, keys, rates, body."""
    settings = server.settings
    public = PUBLIC_PATHS | ({"/metrics"} if settings.metrics_public else set())
    app.add_middleware(
        BodyBounds,
        max_bytes=settings.max_body_bytes,
        max_held=settings.max_body_memory,
        timeout=settings.body_timeout,
    )
    app.add_middleware(RateLimits, limits=server.limits, metrics=server.key_metrics)
    app.add_middleware(
        Authentication, keyring=server.keyring, metrics=server.key_metrics, public=public
    )
    if settings.allowed_origins:
        app.add_middleware(
            Cors,
            allow_origins=settings.allowed_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "X-Ignored-Params", "Retry-After", *LIMIT_HEADERS],
        )
    app.add_middleware(OverLimit)
    recorder = Recorder(server.ledger, server.metrics, logs_access=settings.access_log)
    app.add_middleware(
        Edge, metrics=server.metrics, gate=server.gate, recorder=recorder, tracing=tracing
    )


async def _refuse(request: Request, error: Exception) -> Response:
    """The envelope; refused admissions are counted by their reason, refused keys by theirs."""
    assert isinstance(error, PronkError)
    exchange, server = exchange_of(request.scope), server_of(request)
    exchange.meter.code = error.code or ""
    server.key_metrics.note(exchange.caller.name, error)
    if exchange.is_generation and error.status in REFUSED_ADMISSION:
        server.metrics.reject(server.models.models[0], error.code or "other")
    return await handle_pronk_error(request, error)


def _describe_lazily(app: FastAPI) -> None:
    """OpenAPI's page, made at its first request: a start must be quick."""

    def page() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = describe(app)
        return app.openapi_schema

    app.openapi = page  # type: ignore[method-assign]
