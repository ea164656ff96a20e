"""From a closed exchange to its record: made once the engines have said their last word."""

from __future__ import annotations

import functools
import time

from service.api.access_log import log_access
from service.api.exchange import Exchange, Outcome
from service.ledger.ledger import Ledger
from service.ledger.record import Record
from service.metrics import Metrics

FINISHES = {"failed": "error", "cancelled": "cancelled", "rejected": "rejected"}


class Recorder:
    """One record for each exchange: for the ledger, the keys' counters, its trace and its line."""

    def __init__(self, ledger: Ledger | None, metrics: Metrics, *, logs_access: bool) -> None:
        self._ledger = ledger
        self._metrics = metrics
        self._logs_access = logs_access

    def close(self, exchange: Exchange, method: str, route: str) -> None:
        """Never waits: what an engine sent before it knew of a hang-up is still to come."""
        if exchange.is_recorded or exchange.trace is not None or self._logs_access:
            exchange.ended = time.monotonic()
            write = functools.partial(self._write, exchange, method, route, time.time())
            exchange.meter.tally.when_settled(write)

    def _write(self, exchange: Exchange, method: str, route: str, ended: float) -> None:
        outcome = exchange.settle()
        total = exchange.ended - exchange.arrival
        record = make_record(exchange, route, ended, total, outcome)
        if exchange.is_recorded:
            self._metrics.note_usage(record, outcome)
            if self._ledger is not None:
                self._ledger.add(record)
        if self._logs_access:
            log_access(exchange, method, record, outcome)
        if exchange.trace is not None:
            exchange.trace.end(record, outcome)


def make_record(
    exchange: Exchange, route: str, ended: float, total: float, outcome: Outcome
) -> Record:
    meter, tally = exchange.meter, exchange.meter.tally
    return Record(
        ended,
        exchange.request_id,
        exchange.caller.id,
        exchange.caller.name,
        route,
        meter.model,
        meter.adapter,
        exchange.status,
        FINISHES.get(outcome) or meter.finish,
        meter.code,
        meter.num_choices,
        min(tally.num_prompt, meter.num_prompt),
        min(tally.num_cached, meter.num_prompt),
        meter.num_told,
        max(0, tally.num_drawn - meter.num_told),
        meter.num_reasoning,
        meter.num_accepted,
        meter.num_rejected,
        tally.num_prompt,
        tally.num_drawn,
        tally.queue_seconds,
        tally.prefill_seconds,
        tally.decode_seconds,
        total,
    )
