"""Why the engine takes nothing now, as clients are told, and what it refused itself."""

from __future__ import annotations

from service import errors
from service.engine.messages import Refused

UNAVAILABLE = {  # by stage: code, message
    "starting": ("loading", "The model is still loading; try again shortly."),
    "loading": ("loading", "The model is still loading; try again shortly."),
    "warming_up": ("loading", "The model is being warmed up; try again shortly."),
    "restarting": ("engine_restarting", "The engine is being restarted; try again shortly."),
    "stalled": ("engine_restarting", "The engine makes no progress; try again shortly."),
    "draining": ("draining", "This server is shutting down; try another replica."),
    "failed": ("engine_failed", "The engine could not be started."),
    "stopped": ("engine_failed", "The engine is stopped."),
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
