"""What Prometheus reads: vLLM's names, so existing dashboards work, and the same under pronk's.

Each shared quantity is kept once and written twice. Gauges of the engine are read from its latest
state when they are scraped, so they are never stale and always return to 0.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from starlette.datastructures import State as AppState

from service.api.exchange import Exchange, Outcome
from service.collectors import (
    LABELS,
    OWN,
    VLLM,
    ConnectionStates,
    DrainState,
    EngineStates,
    LedgerState,
    OwnStates,
    TraceState,
    Twice,
)
from service.engine.messages import Output, Outputs, State
from service.http.connections import Connections
from service.ledger.ledger import Ledger
from service.ledger.record import Record
from service.registry import Engine, ModelRegistry, ServedModel
from service.usage_metrics import UsageMetrics

if TYPE_CHECKING:
    from service.tracing.exporting import Deliveries

FIRST_TOKEN = [
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40,
    80, 160, 640, 2560,
]  # fmt: skip
PER_TOKEN = [
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80,
]  # fmt: skip
WHOLE = [
    0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680,
]  # fmt: skip
STEP_TOKENS = [1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384]
HTTP_SECONDS = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600]
FINISH_REASONS = ("stop", "length", "cancelled", "error")
REJECTIONS = ("queue_full", "bodies_full", "loading", "draining", "engine_restarting")
OUTCOMES = ("finished", "failed", "cancelled", "rejected")
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


def token_buckets(longest: int) -> list[float]:
    """1, 2, 5, 10, 20, 50 ... up to the context; a million where it is not known yet."""
    longest = min(longest, 1_000_000)
    buckets: list[float] = []
    scale = 1
    while scale <= longest:
        buckets += [step * scale for step in (1, 2, 5) if step * scale <= longest]
        scale *= 10
    return buckets or [1]


class Metrics:
    """All metrics of one server, in a registry of their own."""

    def __init__(self, models: ModelRegistry, ledger: Ledger | None = None) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # they double every series
        self.registry = CollectorRegistry()
        inner = CollectorRegistry()
        self._models = models
        self._families = Families(inner, max(model.max_model_len for model in models.models))
        inner.register(EngineStates(models))
        self.registry.register(Twice(inner))
        self._http = HttpMetrics(self.registry)
        self._usage = UsageMetrics(self.registry)
        self._engines: dict[tuple[str, int], EngineMetrics] = {}
        for model in models.models:
            for number, engine in enumerate(model.engines):
                metrics = EngineMetrics(self._families, model.name, number)
                engine.observers.append(metrics.observe)
                self._engines[model.name, number] = metrics
        self.registry.register(OwnStates(models, self._engines))
        if ledger is not None:
            self.registry.register(LedgerState(ledger))

    def of(self, model: ServedModel, engine: Engine) -> EngineMetrics:
        return self._engines[model.name, list(model.engines).index(engine)]

    def watch_connections(self, book: Connections) -> None:
        """Of the listener in front, where there is one."""
        self.registry.register(ConnectionStates(book))

    def watch_drain(self, flags: AppState) -> None:
        self.registry.register(DrainState(flags))

    def watch_traces(self, deliveries: Deliveries) -> None:
        self.registry.register(TraceState(deliveries))

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def receive(self, exchange: Exchange) -> None:
        """A request for tokens came; ``close_exchange`` says how it ended."""
        exchange.is_generation = True
        self._http.received.inc()
        self._http.in_flight.inc()

    def reject(self, model: ServedModel, reason: str) -> None:
        self._families.rejections.labels(model.name, "0", reason).inc()

    def close_exchange(self, exchange: Exchange, method: str, handler: str) -> None:
        known = method if method in METHODS else "OTHER"
        self._http.requests.labels(known, str(exchange.status or 499), handler).inc()
        self._http.duration.labels(known, handler).observe(exchange.age)
        if exchange.is_generation:
            self._http.outcomes[exchange.settle()].inc()
            self._http.in_flight.dec()

    def note_usage(self, record: Record, outcome: Outcome) -> None:
        self._usage.note(record, outcome)


class HttpMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        labels = ["method", "status", "handler"]
        self.requests = Counter(
            "http_requests", "HTTP requests answered", labels, registry=registry
        )
        self.duration = Histogram(
            "http_request_duration_seconds",
            "Seconds from a request's first byte to the answer's last",
            ["method", "handler"],
            buckets=HTTP_SECONDS,
            registry=registry,
        )
        self.received = Counter(
            OWN + "requests_received", "Requests for tokens that came", registry=registry
        )
        self.in_flight = Gauge(
            OWN + "requests_in_flight", "Requests for tokens being answered", registry=registry
        )
        self.outcomes = {
            outcome: Counter(
                f"{OWN}requests_{outcome}", f"Requests for tokens: {outcome}", registry=registry
            )
            for outcome in OUTCOMES
        }


class Families:
    """Quantities of generation, labelled by model and engine."""

    def __init__(self, registry: CollectorRegistry, longest: int) -> None:
        self._registry = registry
        tokens = token_buckets(longest)
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens processed")
        self.generation_tokens = self._counter("generation_tokens", "Tokens generated")
        self.success = self._counter("request_success", "Sequences ended", "finished_reason")
        self.rejections = self._counter("admission_rejections", "Requests refused", "reason")
        self.first_token = self._histogram(
            "time_to_first_token_seconds",
            "Seconds from a request's arrival to its first token, by choice",
            FIRST_TOKEN,
        )
        self.inter_token = self._histogram(
            "inter_token_latency_seconds", "Seconds between two tokens of a choice", PER_TOKEN
        )
        self.per_token = self._histogram(
            "request_time_per_output_token_seconds",
            "Mean seconds a token of a choice, the first left out",
            PER_TOKEN,
        )
        self.per_token_old = self._histogram(
            "time_per_output_token_seconds",
            "The older name of request_time_per_output_token_seconds",
            PER_TOKEN,
        )
        self.whole = self._histogram(
            "e2e_request_latency_seconds",
            "Seconds from a request's arrival to a choice's end",
            WHOLE,
        )
        self.queue = self._histogram(
            "request_queue_time_seconds", "Seconds a prompt waited for its first step", WHOLE
        )
        self.inference = self._histogram(
            "request_inference_time_seconds",
            "Seconds from a prompt's first step to a choice's last token",
            WHOLE,
        )
        self.prefill = self._histogram(
            "request_prefill_time_seconds",
            "Seconds from a prompt's first step to its first token",
            WHOLE,
        )
        self.decode = self._histogram(
            "request_decode_time_seconds", "Seconds from a choice's first token to its last", WHOLE
        )
        self.prompt_length = self._histogram(
            "request_prompt_tokens", "Tokens of the prompt, by choice", tokens
        )
        self.answer_length = self._histogram(
            "request_generation_tokens", "Tokens generated, by choice", tokens
        )
        self.step_tokens = self._histogram(
            "iteration_tokens_total", "Tokens computed in one step", STEP_TOKENS
        )

    def _counter(self, name: str, about: str, *labels: str) -> Counter:
        return Counter(VLLM + name, about, [*LABELS, *labels], registry=self._registry)

    def _histogram(self, name: str, about: str, buckets: list[float] | list[int]) -> Histogram:
        return Histogram(VLLM + name, about, LABELS, buckets=buckets, registry=self._registry)


class EngineMetrics:
    """The families with one engine's labels bound once: observing costs no lookup."""

    def __init__(self, families: Families, model: str, number: int) -> None:
        labels = (model, str(number))
        self.prompt_tokens = families.prompt_tokens.labels(*labels)
        self.generation_tokens = families.generation_tokens.labels(*labels)
        self.num_dropped = 0  # tokens that came with the one that completed a stop string
        self.success = {
            reason: families.success.labels(*labels, reason) for reason in FINISH_REASONS
        }
        for reason in REJECTIONS:
            families.rejections.labels(*labels, reason)
        self.first_token = families.first_token.labels(*labels)
        self.inter_token = families.inter_token.labels(*labels)
        self.per_token = families.per_token.labels(*labels)
        self.per_token_old = families.per_token_old.labels(*labels)
        self.whole = families.whole.labels(*labels)
        self.queue = families.queue.labels(*labels)
        self.inference = families.inference.labels(*labels)
        self.prefill = families.prefill.labels(*labels)
        self.decode = families.decode.labels(*labels)
        self.prompt_length = families.prompt_length.labels(*labels)
        self.answer_length = families.answer_length.labels(*labels)
        self.step_tokens = families.step_tokens.labels(*labels)

    def observe(self, message: Outputs | State) -> None:
        """Called by the engine client with everything it hears."""
        if isinstance(message, Outputs):
            self.step_tokens.observe(message.num_scheduled_tokens)
            self.prompt_tokens.inc(sum(output.prompt_tokens or 0 for output in message.outputs))
            self.generation_tokens.inc(sum(len(output.tokens) for output in message.outputs))


class ChoiceTimes:
    """When one choice's tokens came, for the latency histograms."""

    def __init__(self, metrics: EngineMetrics, arrival: float, num_prompt: int) -> None:
        self._metrics = metrics
        self._arrival = arrival
        self._num_prompt = num_prompt
        self._first: float | None = None
        self._last = arrival
        self._num_tokens = 0
        self._prefill = 0.0
        self._is_open = True

    def note(self, output: Output) -> None:
        now = time.monotonic()
        if output.queue_time is not None:
            self._metrics.queue.observe(output.queue_time)
        if output.prefill_time is not None:
            self._prefill = output.prefill_time
            self._metrics.prefill.observe(output.prefill_time)
        if output.tokens:
            self._note_tokens(now, len(output.tokens))

    def _note_tokens(self, now: float, count: int) -> None:
        if self._first is None:
            self._first = now
            self._metrics.first_token.observe(now - self._arrival)
            count_between = count - 1
        else:
            count_between = count
        for _ in range(count_between):
            self._metrics.inter_token.observe((now - self._last) / count)
        self._last = now
        self._num_tokens += count

    def abandon(self) -> None:
        """It is answered anew, and counted then."""
        self._is_open = False

    def close(self, reason: str) -> None:
        """The choice ended: stop, length, cancelled or error. Only the first call counts."""
        if not self._is_open:
            return
        self._is_open = False
        metrics = self._metrics
        metrics.success[reason if reason in metrics.success else "error"].inc()
        metrics.whole.observe(time.monotonic() - self._arrival)
        metrics.prompt_length.observe(self._num_prompt)
        metrics.answer_length.observe(self._num_tokens)
        if self._first is None:
            return
        decode = self._last - self._first
        metrics.decode.observe(decode)
        metrics.inference.observe(decode + self._prefill)
        if self._num_tokens > 1:
            metrics.per_token.observe(decode / (self._num_tokens - 1))
            metrics.per_token_old.observe(decode / (self._num_tokens - 1))
