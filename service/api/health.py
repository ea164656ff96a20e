"""Is it alive, is it ready, what is it: read by balancers, kubelets and dashboards."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import msgspec
from fastapi import APIRouter
from msgspec import Struct
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from service import __version__
from service.api.openapi import stated
from service.api.server import Server, server_of
from service.registry import ServedModel

router = APIRouter()
RETRY_AFTER = {"Retry-After": "1"}

Endpoint = Callable[..., Awaitable[Response]]


def get_or_head(
    path: str, answer: type[Struct], *, may_fail: bool = False
) -> Callable[[Endpoint], Endpoint]:
    """A GET route that answers HEAD too, as balancers send it; documented once."""

    def register(endpoint: Endpoint) -> Endpoint:
        get = router.get(path, **stated(answer, may_fail=may_fail))
        return router.head(path, include_in_schema=False)(get(endpoint))

    return register


class Alive(Struct):
    status: str


class Live(Struct):
    live: bool


class Ready(Struct):
    ready: bool


class Version(Struct):
    version: str


class Readiness(Struct):
    """``stage``: starting, loading, warming_up, ready, restarting, stalled, draining, failed."""

    status: str  # ready, or not_ready
    stage: str
    progress: float  # 0..1 of the loading
    reason: str


def readiness(server: Server) -> Readiness:
    """Of the least ready model; draining goes before all."""
    if server.is_draining:
        return Readiness("not_ready", "draining", 1.0, "the server is shutting down")
    for model in server.models.models:
        if not model.is_ready:
            return _unready(model)
    return Readiness("ready", "ready", 1.0, "")


def _unready(model: ServedModel) -> Readiness:
    state = model.engines[0].state
    stage = "loading" if state.stage == "ready" else state.stage  # its tokenizer is still missing
    return Readiness("not_ready", stage, state.progress, state.reason)


@get_or_head("/livez", Alive)
async def livez() -> Response:
    """200 as long as this process answers at all."""
    return _json(200, Alive("alive"))


@get_or_head("/readyz", Readiness, may_fail=True)
@get_or_head("/health", Readiness, may_fail=True)
async def readyz(request: Request) -> Response:
    """200 when every model can answer, else 503 with the stage, its progress and the reason."""
    found = readiness(server_of(request))
    return _json(200 if found.status == "ready" else 503, found)


@get_or_head("/v2/health/live", Live)
async def live() -> Response:
    """Open inference protocol."""
    return _json(200, Live(True))


@get_or_head("/v2/health/ready", Ready, may_fail=True)
async def ready(request: Request) -> Response:
    """Open inference protocol."""
    is_ready = readiness(server_of(request)).status == "ready"
    return _json(200 if is_ready else 503, Ready(is_ready))


@router.get("/version", **stated(Version))
async def version() -> Response:
    return _json(200, Version(__version__))


@router.get(
    "/metrics",
    response_class=PlainTextResponse,
    responses={200: {"description": "Prometheus' text format"}},
)
async def metrics(request: Request) -> Response:
    """Prometheus' text format; for admin keys, unless `--metrics-public`."""
    server = server_of(request)
    if not server.settings.metrics_public:
        server.require_admin(request)
    body = server.metrics.text()
    return Response(body, headers={"Content-Type": CONTENT_TYPE_LATEST})


def _json(status: int, values: Struct) -> Response:
    headers = {"Cache-Control": "no-store", **(RETRY_AFTER if status == 503 else {})}
    return Response(msgspec.json.encode(values), status, headers, media_type="application/json")
