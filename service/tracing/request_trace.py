"""One request's spans: the server's, and below it what the engine did for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opentelemetry import propagate, trace
from opentelemetry.trace import SpanKind, Status, StatusCode
from starlette.types import Scope

from service.api.exchange import Exchange, Outcome, route_path
from service.tracing.attributes import ending, opening

if TYPE_CHECKING:
    from opentelemetry.trace import Span, Tracer

    from service.ledger.record import Record

SECOND = 1_000_000_000  # nanoseconds
LONGEST_HEADER = 4096  # of traceparent, tracestate and baggage; longer ones are not read


class RequestTrace:
    """Starts with the exchange, below the client's span if it names one; ends once."""

    def __init__(self, tracer: Tracer, exchange: Exchange, scope: Scope) -> None:
        self._tracer = tracer
        self._exchange = exchange
        self._method = scope["method"]
        self._span = tracer.start_span(
            self._method,
            context=propagate.extract(_carrier(scope)),
            kind=SpanKind.SERVER,
            attributes=opening(exchange, scope, route_path(scope)),
            start_time=exchange.started,
        )
        self.trace_id = format(self._span.get_span_context().trace_id, "032x")
        self.span_id = format(self._span.get_span_context().span_id, "016x")

    def end(self, record: Record, outcome: Outcome) -> None:
        """Times are the exchange's own: a clock set back or forth bends no span."""
        span, exchange = self._span, self._exchange
        if not span.is_recording():
            return
        self._trace_engine(span, outcome)
        if record.route != "unmatched":
            span.update_name(f"{self._method} {record.route}")
        span.set_attributes(ending(exchange, record, outcome))
        if outcome == "failed" or (record.status or 0) >= 500:
            span.set_status(Status(StatusCode.ERROR, record.code or None))
        span.end(exchange.started + round(record.total_seconds * SECOND))

    def _trace_engine(self, span: Span, outcome: Outcome) -> None:
        """Queue, prefill and decode, of the prompt whose answer came first where there are many."""
        tally = self._exchange.meter.tally
        first = tally.first_output
        if first is None:
            if tally.began is not None and outcome != "rejected":  # it left while it waited
                self._child("queue", span, tally.began, self._exchange.ended)
            return
        came, queued, prefill = first
        self._child("queue", span, came - prefill - queued, came - prefill)
        self._child("prefill", span, came - prefill, came)
        if tally.decode_seconds is not None and tally.num_drawn > 1:
            self._child("decode", span, came, came + tally.decode_seconds)

    def _child(self, name: str, parent: Span, start: float, end: float) -> None:
        """``start`` and ``end`` as time.monotonic() has them."""
        start = max(start, self._exchange.arrival)
        context = trace.set_span_in_context(parent)
        child = self._tracer.start_span(name, context=context, start_time=self._clock(start))
        child.end(self._clock(max(start, end)))

    def _clock(self, moment: float) -> int:
        exchange = self._exchange
        return exchange.started + round((moment - exchange.arrival) * SECOND)


def _carrier(scope: Scope) -> dict[str, str]:
    """The headers, as propagators read them; a name that comes twice says nothing."""
    found: dict[str, str] = {}
    doubled: set[str] = set()
    for name, value in scope["headers"]:
        if len(value) > LONGEST_HEADER:
            continue
        key = name.decode("latin-1")
        if key in found:
            doubled.add(key)
        found[key] = value.decode("latin-1")
    return {key: value for key, value in found.items() if key not in doubled}
