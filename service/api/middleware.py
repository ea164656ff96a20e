"""Pure ASGI middlewares: the edge (request id, books, last resort), connections over the limit, the
body's bounds.

They look at ``scope["path"]`` and never at a URL rebuilt from the Host header.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from typing import TYPE_CHECKING

import msgspec
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.anthropic_errors import speaks_anthropic
from service.api.authentication import PUBLIC_PATHS
from service.api.errors import RequestTimeout, envelope, error_response, internal_error
from service.api.exchange import KEY, OVER_LIMIT, Exchange, request_id, route_path
from service.api.gate import Gate
from service.api.recorder import Recorder
from service.errors import BodiesFull, InvalidRequest, RequestTooLarge, TooManyConnections
from service.log_context import logging_about
from service.metrics import Metrics

if TYPE_CHECKING:
    from service.tracing.exporting import Tracing

logger = logging.getLogger("pronk.api")

UNTRACED = PUBLIC_PATHS | {"/metrics"}  # asked for every few seconds, for ever
BODIES_RETRY = 2.0  # seconds: answers end, and with them go the bodies they came from
BODY_METHODS = frozenset({"POST", "PUT", "PATCH"})
SLOWEST_BODY = 4096  # bytes a second, on the whole
ALWAYS = {  # whatever is answered; what a route says itself goes before
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",  # answers are one caller's
}


class Edge:
    """Outermost: names the exchange, counts it, and turns what nobody caught into a 500."""

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        gate: Gate,
        recorder: Recorder,
        tracing: Tracing | None = None,
    ) -> None:
        self.app = app
        self.metrics = metrics
        self.gate = gate
        self.recorder = recorder
        self.tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        exchange = scope[KEY] = Exchange(request_id(scope))
        if self.tracing is not None and route_path(scope) not in UNTRACED:
            exchange.trace = self.tracing.begin(exchange, scope)
        trace_id = "" if exchange.trace is None else exchange.trace.trace_id
        with logging_about(exchange.request_id, trace_id):
            await self._answer(exchange, scope, receive, send)

    async def _answer(self, exchange: Exchange, scope: Scope, receive: Receive, send: Send) -> None:
        async def stamped(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = exchange.request_id
                for name, value in ALWAYS.items():
                    headers.setdefault(name, value)
                if speaks_anthropic(route_path(scope)):
                    headers["Request-Id"] = exchange.request_id  # as its clients look for it
            await send(message)

        try:
            await self.app(scope, receive, stamped)
        except ClientDisconnect:
            exchange.outcome = "cancelled"  # it hung up while it sent its body
        except Exception:
            logger.exception("the request failed", extra={"request_id": exchange.request_id})
            if exchange.status is not None:
                exchange.outcome = "failed"
                raise
            await error_response(internal_error(), scope)(scope, receive, stamped)
        finally:
            self.gate.leave(exchange)
            handler = _handler(scope)
            self.metrics.close_exchange(exchange, scope["method"], handler)
            self.recorder.close(exchange, scope["method"], handler)


def _handler(scope: Scope) -> str:
    """The route's template: bounded, whatever paths strangers try."""
    return getattr(scope.get("route"), "path", None) or "unmatched"


class Cors(CORSMiddleware):
    """Starlette's, whose refusals are plain text, in the one envelope."""

    def preflight_response(self, request_headers: Headers) -> Response:
        response = super().preflight_response(request_headers)
        if response.status_code < 400:
            return response
        why = bytes(response.body).decode()
        refused = InvalidRequest(f"{why}: see --allowed-origins.")
        kept = {
            name: value
            for name, value in response.headers.items()
            if name not in ("content-length", "content-type")
        }
        content = msgspec.json.encode(envelope(refused))
        return Response(content, refused.status, kept, media_type="application/json")


class OverLimit:
    """On a connection that is one too many only health checks are answered.

    Balancers and kubelets ask while everything is taken; a server that is merely full must not
    look dead to them.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_over = scope["type"] == "http" and scope.get("state", {}).get(OVER_LIMIT, False)
        if not is_over or route_path(scope) in PUBLIC_PATHS:
            await self.app(scope, receive, send)
            return
        refused = TooManyConnections(
            "All connections of this server are in use: try again, or another replica.",
            retry_after=1,
        )
        await error_response(refused, scope, {"Connection": "close"})(scope, receive, send)


class BodyBounds:
    """Refuses a body that is too large, while it streams in, and a client that drips or stops.

    Nothing for ``timeout`` seconds is too slow, and so is less than ``SLOWEST_BODY`` bytes a second
    on the whole, ``timeout`` seconds granted.

    What all requests being answered have brought is bounded, too: each byte counts from when it is
    here until its answer has ended, because what a body became lives as long. Starlette has a
    limiter of its own, but it answers in plain text, and in place of a 401.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, max_held: int, timeout: float) -> None:
        self.app = app
        self.max_bytes = max_bytes
        self.max_held = max_held
        self.timeout = timeout
        self.held: Counter[str] = Counter()  # by account

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in BODY_METHODS:
            await self.app(scope, receive, send)
            return
        account = scope[KEY].caller.id
        size = 0
        complete = False
        began = time.monotonic()

        async def bounded() -> Message:
            nonlocal size, complete
            if complete:
                return await receive()
            if _stated_length(scope) > self.max_bytes:
                raise self._too_large()
            left = began + self.timeout + size / SLOWEST_BODY - time.monotonic()
            try:
                async with asyncio.timeout(min(self.timeout, left)):
                    message = await receive()
            except TimeoutError:
                raise RequestTimeout(
                    f"The body came too slowly: after {self.timeout:g} seconds of patience it must "
                    f"come at {SLOWEST_BODY} bytes a second or more."
                ) from None
            came = len(message.get("body", b""))
            size += came
            self.held[account] += came
            complete = not message.get("more_body", False)
            if size > self.max_bytes:
                raise self._too_large()
            if self._is_over_share(account):
                raise self._too_many()
            return message

        try:
            await self.app(scope, bounded, send)
        finally:
            self.held[account] -= size
            if not self.held[account]:
                del self.held[account]

    def _is_over_share(self, account: str) -> bool:
        """Where all hold too much: who holds more than others do, or all, at twice the bound."""
        total = self.held.total()
        if total <= self.max_held:
            return False
        return total > 2 * self.max_held or self.held[account] > self.max_held / len(self.held)

    def _too_large(self) -> RequestTooLarge:
        return RequestTooLarge(
            f"The body is larger than this server takes: {self.max_bytes} bytes."
        )

    def _too_many(self) -> BodiesFull:
        return BodiesFull(
            "The bodies of the requests being answered fill the memory for them: "
            f"{self.max_held} bytes. Try again after the time in Retry-After.",
            retry_after=BODIES_RETRY,
        )


def _stated_length(scope: Scope) -> int:
    text = Headers(scope=scope).get("content-length", "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else 0
