"""Why the engine takes nothing now, as clients are told, and what it refused itself."""

from __future__ import annotations

from service import errors
from service.engine.messages import Refused

UNAVAILABLE = {  # by stage: code, message
    "starting": ("loading", "the model is being loaded: try again later"),
    "loading": ("loading", "the model is being loaded: try again later"),
    "warming_up": ("loading", "the model is being warmed up: try again later"),
    "restarting": ("engine_restarting", "the engine is being restarted: try again later"),
    "stalled": ("engine_restarting", "the engine makes no progress: try again later"),
    "draining": ("draining", "the server is shutting down: try again, if possible elsewhere"),
    "failed": ("engine_failed", "the engine could not be started"),
    "stopped": ("engine_failed", "the engine is stopped"),
}


def unavailable(stage: str, retry_after: float) -> errors.Unavailable:
    code, message = UNAVAILABLE.get(stage, UNAVAILABLE["restarting"])
    return errors.Unavailable(message, code=code, retry_after=retry_after)


def as_error(refused: Refused) -> errors.PronkError:
    """The class of ``service.errors`` the engine named; any other name is a failure of its own."""
    kind = getattr(errors, refused.kind, None)
    if not (isinstance(kind, type) and issubclass(kind, errors.PronkError)):
        kind = errors.EngineFailure
    return kind(
        refused.message, param=refused.param, code=refused.code, retry_after=refused.retry_after
    )
