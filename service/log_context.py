"""Which request a log line is about, without handing its id to every function that may log."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_about: ContextVar[dict[str, str] | None] = ContextVar("about", default=None)


@contextmanager
def logging_about(request_id: str, trace_id: str = "") -> Iterator[None]:
    """Lines of the block, of its tasks and of its threads carry the ids."""
    ids = {"request_id": request_id}
    if trace_id:
        ids["trace_id"] = trace_id
    token = _about.set(ids)
    try:
        yield
    finally:
        _about.reset(token)


class AboutRequest(logging.Filter):
    """Adds the ids to records that do not name another request themselves."""

    def filter(self, record: logging.LogRecord) -> bool:
        ids = _about.get()
        known = vars(record)
        if ids is not None and known.get("request_id", ids["request_id"]) == ids["request_id"]:
            known |= ids
        return True
