"""Who calls? Decided on ``scope["path"]`` and the headers, before a byte of the body is read.

Deny by default: every path but the public ones needs a key, whatever routes there are. What a key
may do beyond that (admin routes, models) its routes ask themselves.
"""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from service.api.errors import error_response
from service.api.exchange import KEY, Caller, route_path
from service.errors import AuthenticationFailed
from service.keys.key import Key
from service.keys.keyring import Keyring
from service.keys.metrics import KeyMetrics

PUBLIC_PATHS = frozenset({"/livez", "/readyz", "/health", "/v2/health/live", "/v2/health/ready"})


class Authentication:
    """Names the exchange's caller, or answers 401."""

    def __init__(
        self, app: ASGIApp, keyring: Keyring, metrics: KeyMetrics, public: frozenset[str]
    ) -> None:
        self.app = app
        self.keyring = keyring
        self.metrics = metrics
        self.public = public

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or self.keyring.is_open or route_path(scope) in self.public:
            await self.app(scope, receive, send)
            return
        try:
            key = self._authenticate(Headers(scope=scope))
        except AuthenticationFailed as refused:
            if scope["type"] == "http":
                await error_response(refused, scope)(scope, receive, send)
            else:
                await send({"type": "websocket.close", "code": 1008, "reason": ""})
            return
        if scope["type"] == "http":
            scope[KEY].caller = Caller(key.id, key.name, key.weight, key.admin, key.models)
        await self.app(scope, receive, send)

    def _authenticate(self, headers: Headers) -> Key:
        """Raises ``AuthenticationFailed`` for a missing, doubled, wrong, ended or disabled key."""
        bearers, bare = headers.getlist("authorization"), headers.getlist("x-api-key")
        key = self._identify(bearers, bare)
        if key is None and not (bearers or bare):
            raise self._refuse("", "missing", "No API key came")
        if key is None:
            raise self._refuse("", "wrong", "The API key is not one of this server's")
        if key.disabled:
            raise self._refuse(key.name, "disabled", "The API key was revoked")
        if key.is_expired(self.keyring.clock()):
            raise self._refuse(key.name, "expired", "The API key has expired")
        return key

    def _identify(self, bearers: list[str], bare: list[str]) -> Key | None:
        """``bare`` are keys of ``x-api-key``, which Anthropic's clients send; beside a bearer it
        must be the same key."""
        if len(bearers) > 1 or len(bare) > 1:
            return None
        found = [self._find_bearer(value) for value in bearers]
        found += [self.keyring.find(key) for key in bare]
        is_one = found and all(key is found[0] for key in found)
        return found[0] if is_one else None

    def _find_bearer(self, authorization: str) -> Key | None:
        scheme, _, key = authorization.partition(" ")
        found = self.keyring.find(key)
        return found if scheme.lower() == "bearer" else None

    def _refuse(self, name: str, reason: str, problem: str) -> AuthenticationFailed:
        self.metrics.reject(name, reason)
        return AuthenticationFailed(
            f"{problem}: send one as 'Authorization: Bearer <key>' or 'x-api-key: <key>'."
        )
