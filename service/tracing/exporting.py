"""From spans to a collector (OTLP over HTTP), in a thread of the SDK's, with a bounded queue.

A collector that is gone costs the spans, nothing else: two lines in the log, one when it is lost
and one when it is back. Everything but the endpoint is the standard's: OTEL_SERVICE_NAME,
OTEL_RESOURCE_ATTRIBUTES, OTEL_TRACES_SAMPLER, OTEL_BSP_*, OTEL_EXPORTER_OTLP_HEADERS and the rest.
"""

from __future__ import annotations

import logging
import os
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from service import __version__

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.trace.export import SpanExporter
    from starlette.types import Scope

    from service.api.exchange import Exchange
    from service.tracing.request_trace import RequestTrace

logger = logging.getLogger("pronk.traces")

FLUSH = 3.0  # seconds the last spans get to leave when the server ends
STANDARD_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
MISSING = "traces need the extra otel: pip install '.[otel]'"


class TracingProblem(RuntimeError):
    """Traces were asked for and cannot be made; the text says why in one line."""


class Tracing:
    """One for each server: starts requests' traces, and knows what became of the spans."""

    def __init__(self, exporter: SpanExporter, *, is_batched: bool = True) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor

        self.deliveries = Deliveries(exporter)
        self._provider = TracerProvider(
            resource=Resource.create(_resource(os.environ)), shutdown_on_exit=False
        )
        processor = BatchSpanProcessor if is_batched else SimpleSpanProcessor
        self._provider.add_span_processor(processor(self.deliveries))
        self._tracer = self._provider.get_tracer("pronk", __version__)

    def begin(self, exchange: Exchange, scope: Scope) -> RequestTrace:
        from service.tracing.request_trace import RequestTrace

        return RequestTrace(self._tracer, exchange, scope)

    def close(self) -> None:
        """The last spans leave if that takes no longer than ``FLUSH``."""
        last = threading.Thread(target=self._provider.shutdown, name="last spans", daemon=True)
        last.start()
        last.join(FLUSH)
        if last.is_alive():
            self.deliveries.shutdown()


class Deliveries:
    """An exporter that counts, and logs only news. The SDK calls it in its own thread."""

    def __init__(self, exporter: SpanExporter) -> None:
        self.num_exported = 0
        self.num_lost = 0  # the collector refused them, or was not there
        self._exporter = exporter
        self._has_failed = False

    def export(self, spans: Sequence[ReadableSpan]) -> object:
        from opentelemetry.sdk.trace.export import SpanExportResult

        try:
            result = self._exporter.export(spans)
        except Exception:  # whatever a transport raises: spans are never worth a request
            result = SpanExportResult.FAILURE
        if result is SpanExportResult.SUCCESS:
            self.num_exported += len(spans)
        else:
            self.num_lost += len(spans)
        self._note(has_failed=result is not SpanExportResult.SUCCESS)
        return result

    def _note(self, *, has_failed: bool) -> None:
        if has_failed and not self._has_failed:
            logger.warning("the collector takes no spans: they are lost until it does")
        elif self._has_failed and not has_failed:
            logger.info("the collector takes spans again; %d were lost", self.num_lost)
        self._has_failed = has_failed

    def shutdown(self) -> None:
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return bool(self._exporter.force_flush(timeout_millis))


@contextmanager
def traced(wanted: str | None) -> Iterator[Tracing | None]:
    """``wanted``: the collector's URL, or None for what the standard's variables say.

    Raises ``TracingProblem`` where an endpoint was given and traces cannot be made. Variables may
    be meant for others: without the extra they are one warning.
    """
    if _is_disabled(os.environ) or not (wanted or any(map(os.environ.get, STANDARD_ENDPOINTS))):
        yield None
        return
    try:
        tracing = Tracing(_otlp_exporter(wanted))
    except ImportError:
        if wanted:
            raise TracingProblem(MISSING) from None
        logger.warning("OTEL_EXPORTER_OTLP_ENDPOINT is set, but %s", MISSING)
        yield None
        return
    except ValueError as error:
        raise TracingProblem(f"traces cannot be exported: {error}") from None
    try:
        yield tracing
    finally:
        tracing.close()


def _otlp_exporter(wanted: str | None) -> SpanExporter:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    # It would log every failed try, and the SDK every span its queue has no room for.
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
    return OTLPSpanExporter(endpoint=_with_path(wanted) if wanted else None)


def _with_path(url: str) -> str:
    """The collector's address alone will do: the path is the standard's."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ValueError(f"--otlp-traces-endpoint must be an http or https URL, not {url!r}")
    return url if parts.path.strip("/") else f"{url.rstrip('/')}/v1/traces"


def _is_disabled(environment: Mapping[str, str]) -> bool:
    return (
        environment.get("OTEL_SDK_DISABLED", "").lower() == "true"
        or environment.get("OTEL_TRACES_EXPORTER", "").lower() == "none"
    )


def _resource(environment: Mapping[str, str]) -> dict[str, str]:
    """What the environment says goes before."""
    own = {
        "service.name": "pronk",
        "service.version": __version__,
        "service.instance.id": str(uuid.uuid4()),
    }
    said = environment.get("OTEL_RESOURCE_ATTRIBUTES", "")
    told = {pair.partition("=")[0].strip() for pair in said.split(",")}
    if environment.get("OTEL_SERVICE_NAME"):
        told.add("service.name")
    return {name: value for name, value in own.items() if name not in told}
