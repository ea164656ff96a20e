"""Pure ASGI middlewares: the edge (request id, books, last resort), connections over the limit, the
keys, the body's bounds.

They look at ``scope["path"]`` and never at a URL rebuilt from the Host header, and decide before
a byte of the body is read.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import time
from collections.abc import Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.anthropic_errors import speaks_anthropic
from service.api.errors import RequestTimeout, error_response, internal_error
from service.api.exchange import KEY, OVER_LIMIT, Caller, Exchange, request_id, route_path
from service.errors import AuthenticationFailed, RequestTooLarge, TooManyConnections
from service.metrics import Metrics

logger = logging.getLogger("pronk.api")

PUBLIC_PATHS = frozenset({"/livez", "/readyz", "/health", "/v2/health/live", "/v2/health/ready"})
BODY_METHODS = frozenset({"POST", "PUT", "PATCH"})
SLOWEST_BODY = 4096  # bytes a second, on the whole
ALWAYS = {  # whatever is answered; what a route says itself goes before
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",  # answers are one caller's
}


class Edge:
    """Outermost: names the exchange, counts it, and turns what nobody caught into a 500."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        exchange = scope[KEY] = Exchange(request_id(scope))

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
            logger.exception("request %s failed", exchange.request_id)
            if exchange.status is not None:
                exchange.outcome = "failed"
                raise
            await error_response(internal_error(), scope)(scope, receive, stamped)
        finally:
            self.metrics.close_exchange(exchange, scope["method"], _handler(scope))


def _handler(scope: Scope) -> str:
    """The route's template: bounded, whatever paths strangers try."""
    return getattr(scope.get("route"), "path", None) or "unmatched"


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


class Authentication:
    """Deny by default: a key for every path but the public ones.

    Keys are compared as SHA-256 digests, all of them, in constant time.
    """

    def __init__(self, app: ASGIApp, keys: Iterable[str], public: frozenset[str]) -> None:
        self.app = app
        self.digests = [hashlib.sha256(key.encode()).digest() for key in keys]
        self.public = public

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or not self.digests or route_path(scope) in self.public:
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        bearers, bare = headers.getlist("authorization"), headers.getlist("x-api-key")
        key_id = self.identify(bearers, bare)
        if key_id is not None and scope["type"] == "http":
            scope[KEY].caller = Caller(id=key_id, name=key_id)
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            refused = _unauthenticated(bool(bearers or bare))
            await error_response(refused, scope)(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008, "reason": ""})

    def identify(self, bearers: list[str], bare: list[str]) -> str | None:
        """The caller's key id, or None for a missing, doubled or wrong key.

        ``bare`` are keys of ``x-api-key``, which Anthropic's clients send; beside a bearer it must
        be the same key.
        """
        if len(bearers) > 1 or len(bare) > 1:
            return None
        found = [self._find_bearer(value) for value in bearers] + [self._find(key) for key in bare]
        return found[0] if len(set(found)) == 1 else None

    def _find_bearer(self, authorization: str) -> str | None:
        scheme, _, key = authorization.partition(" ")
        found = self._find(key)
        return found if scheme.lower() == "bearer" else None

    def _find(self, key: str) -> str | None:
        offered = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        found = None
        for digest in self.digests:
            if hmac.compare_digest(digest, offered):
                found = digest.hex()[:16]
        return found


def _unauthenticated(has_offered: bool) -> AuthenticationFailed:
    problem = "The API key is not one of this server's" if has_offered else "No API key came"
    return AuthenticationFailed(
        f"{problem}: send it as 'Authorization: Bearer <key>' or 'x-api-key: <key>'."
    )


class BodyBounds:
    """Refuses a body that is too large, while it streams in, and a client that drips or stops.

    Nothing for ``timeout`` seconds is too slow, and so is less than ``SLOWEST_BODY`` bytes a second
    on the whole, ``timeout`` seconds granted.

    Starlette has a limiter of its own, but it answers in plain text, and in place of a 401.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, timeout: float) -> None:
        self.app = app
        self.max_bytes = max_bytes
        self.timeout = timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in BODY_METHODS:
            await self.app(scope, receive, send)
            return
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
            size += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if size > self.max_bytes:
                raise self._too_large()
            return message

        await self.app(scope, bounded, send)

    def _too_large(self) -> RequestTooLarge:
        return RequestTooLarge(
            f"The body is larger than this server takes: {self.max_bytes} bytes."
        )


def _stated_length(scope: Scope) -> int:
    text = Headers(scope=scope).get("content-length", "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else 0
