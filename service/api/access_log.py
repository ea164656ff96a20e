"""One line for each request that has ended (``--access-log``): numbers and names, no content."""

from __future__ import annotations

import logging

from service.api.authentication import PUBLIC_PATHS
from service.api.exchange import Exchange, Outcome
from service.ledger.record import Record

logger = logging.getLogger("pronk.access")


def log_access(exchange: Exchange, method: str, record: Record, outcome: Outcome) -> None:
    """Health checks are left out. Ids are given: whoever calls may be in no request's context."""
    if record.route in PUBLIC_PATHS:
        return
    told: dict[str, object] = {"request_id": record.request_id}
    if exchange.trace is not None:
        told["trace_id"] = exchange.trace.trace_id
    told |= {
        "key": record.key_name or None,
        "method": method,
        "route": record.route,
        "status": record.status,
        "outcome": outcome,
        "seconds": round(record.total_seconds, 6),
    }
    if record.code:
        told["code"] = record.code
    if exchange.is_generation:
        told |= {
            "model": record.adapter or record.model or None,
            "finish": record.finish,
            "prompt_tokens": record.prompt_tokens,
            "cached_tokens": record.cached_tokens,
            "generated_tokens": record.generated_tokens,
            "queue_seconds": _rounded(record.queue_seconds),
            "prefill_seconds": _rounded(record.prefill_seconds),
            "decode_seconds": _rounded(record.decode_seconds),
        }
    extra = {name: value for name, value in told.items() if value is not None}
    logger.info("%s %s %s", method, record.route, record.status or "-", extra=extra)


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)
