"""Every failure a client can be told of, drawn as a tree, each with its HTTP status.

The engine refuses with them across the seam (by class name), the API turns them into the one error
envelope of the wire. Messages say what was wrong, the bound, and what to send instead; they never
carry addresses, paths, traces or another request's text.
"""

from __future__ import annotations


class PronkError(Exception):
    """Root of what a client can be told. ``param`` is a field's path, ``code`` the wire's word."""

    status: int = 500
    type: str = "server_error"
    code: str | None = None
    param: str | None = None

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after = retry_after  # seconds; the API rounds it up into Retry-After
        if param is not None:
            self.param = param
        if code is not None:
            self.code = code


class InvalidRequest(PronkError):
    status = 400
    type = "invalid_request_error"


class GrammarRefused(InvalidRequest):
    """A schema, pattern or grammar that nothing can follow, or that takes too much to compile."""


class ContextLengthExceeded(InvalidRequest):
    code = "context_length_exceeded"


class NotSupported(InvalidRequest):
    """A field the wire knows and this version does not serve: refused, never ignored."""

    code = "unsupported_parameter"


class PoisonRequest(InvalidRequest):
    """It ended the engine twice while it was computed; see ``service.engine.quarantine``."""

    code = "poison_request"


class RequestTooLarge(InvalidRequest):
    status = 413
    code = "request_too_large"


class HeadersTooLarge(InvalidRequest):
    status = 431
    code = "headers_too_large"


class UnsupportedMediaType(InvalidRequest):
    status = 415


class MethodNotAllowed(InvalidRequest):
    status = 405


class AuthenticationFailed(PronkError):
    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class PermissionDenied(PronkError):
    status = 403
    type = "permission_error"


class AdminRequired(PermissionDenied):
    code = "admin_required"


class ModelNotAllowed(PermissionDenied):
    """Of a key that may use some models only; also where there is no such model, so that it does
    not learn which ones there are."""

    code = "model_not_allowed"
    param = "model"


class NotFound(PronkError):
    status = 404
    type = "not_found_error"


class ModelNotFound(NotFound):
    code = "model_not_found"
    param = "model"


class RateLimited(PronkError):
    """``retry_after`` is when the same request would be let in, at the latest; None: never."""

    status = 429
    type = "rate_limit_error"

    def __init__(self, message: str, *, limit: str = "", retry_after: float | None = None) -> None:
        super().__init__(message, retry_after=retry_after)
        self.limit = limit  # which of the key's limits, for metrics


class LimitReached(RateLimited):
    code = "rate_limit_exceeded"


class QuotaSpent(RateLimited):
    code = "insufficient_quota"


class Overloaded(PronkError):
    """The bounded queue is full. ``retry_after`` comes from the measured drain rate."""

    status = 429
    type = "overloaded_error"
    code = "queue_full"


class BodiesFull(Overloaded):
    """The requests being answered have brought as many bytes as may be held."""

    code = "bodies_full"


class Unavailable(PronkError):
    """``code`` is ``loading``, ``draining`` or ``engine_restarting``."""

    status = 503
    type = "service_unavailable"


class TooManyConnections(Unavailable):
    code = "too_many_connections"


class EngineFailure(PronkError):
    """The engine failed on this request, or died under it."""

    code = "engine_failure"


class EngineLost(EngineFailure):
    """It died once, after the reader had seen something: who told nobody of it may ask again."""
