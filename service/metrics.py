"""What Prometheus reads: vLLM's names, so existing dashboards work, and the same under pronk's.

Each shared quantity is kept once and written twice. Gauges of the engine are read from its latest
state when they are scraped, so they are never stale and always return to 0.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from service.api.exchange import Exchange
from service.engine.messages import Output, Outputs, State
from service.registry import Engine, ModelRegistry, ServedModel

VLLM, OWN = "vllm:", "pronk:"
LABELS = ["model_name", "engine"]

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
REJECTIONS = ("queue_full", "loading", "draining", "engine_restarting")
OUTCOMES = ("finished", "failed", "cancelled", "rejected")
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

# metric: (the worker's counter in State.counters, what it counts)
ENGINE_COUNTERS = {
    "num_preemptions": ("preemptions", "Sequences put back to the queue for want of blocks"),
    "prefix_cache_queries": ("prefix_queries", "Prompt tokens looked up in the prefix cache"),
    "prefix_cache_hits": ("prefix_hits", "Prompt tokens found in the prefix cache"),
    "spec_decode_num_drafts": ("spec_drafts", "Speculations made"),
    "spec_decode_num_draft_tokens": ("spec_draft_tokens", "Tokens speculated"),
    "spec_decode_num_accepted_tokens": ("spec_accepted_tokens", "Speculated tokens accepted"),
}


def token_buckets(longest: int) -> list[float]:
    """1, 2, 5, 10, 20, 50 ... up to the context; a million where it is not known yet."""
    longest = min(longest, 1_000_000)
    buckets: list[float] = []
    scale = 1
    while scale <= longest:
        buckets += [step * scale for step in (1, 2, 5) if step * scale <= longest]
        scale *= 10
    return buckets or [1]


class Twice(Collector):
    """Every family of ``inner``, under vLLM's prefix and under pronk's."""

    def __init__(self, inner: CollectorRegistry) -> None:
        self.inner = inner

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        """vLLM's own family first, then its twin."""
        for family in self.inner.collect():
            yield family
            own = Metric(family.name.replace(VLLM, OWN, 1), family.documentation, family.type)
            own.samples = [
                sample._replace(name=sample.name.replace(VLLM, OWN, 1)) for sample in family.samples
            ]
            yield own


class EngineStates(Collector):
    """Gauges and counters the engines report about themselves, read when scraped."""

    def __init__(self, models: ModelRegistry) -> None:
        self.models = models

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        rows = [
            ([model.name, str(number)], engine.state)
            for model in self.models.models
            for number, engine in enumerate(model.engines)
        ]
        yield _gauge("num_requests_running", "Sequences in the running batch", rows, _running)
        yield _gauge("num_requests_waiting", "Sequences in the queue", rows, _waiting)
        yield _gauge("kv_cache_usage_perc", "Share of KV blocks in use, 0..1", rows, _usage)
        yield _gauge("gpu_cache_usage_perc", "The older name of kv_cache_usage_perc", rows, _usage)
        for name, (counter, about) in ENGINE_COUNTERS.items():
            family = CounterMetricFamily(VLLM + name, about, labels=LABELS)
            for labels, state in rows:
                family.add_metric(labels, state.counters.get(counter, 0))
            yield family
        yield _cache_config(rows)
        yield _lora_info(rows)


class OwnStates(Collector):
    """What vLLM has no name for."""

    def __init__(
        self, models: ModelRegistry, metrics: Mapping[tuple[str, int], EngineMetrics]
    ) -> None:
        self.models = models
        self.metrics = metrics

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        restarts = CounterMetricFamily(
            OWN + "engine_restarts", "Engine processes started anew", labels=LABELS
        )
        ready = GaugeMetricFamily(OWN + "engine_ready", "1 while it takes work", labels=LABELS)
        waiting = GaugeMetricFamily(
            OWN + "waiting_prompt_tokens", "Prompt tokens in the queue", labels=LABELS
        )
        discarded = CounterMetricFamily(
            OWN + "discarded_tokens", "Tokens drawn that no client was told", labels=LABELS
        )
        for model in self.models.models:
            for number, engine in enumerate(model.engines):
                labels = [model.name, str(number)]
                dropped = self.metrics[model.name, number].num_dropped + engine.num_discarded
                in_engine = engine.state.counters.get("discarded_tokens", 0)
                discarded.add_metric(labels, dropped + in_engine)
                restarts.add_metric(labels, engine.num_restarts)
                ready.add_metric(labels, engine.is_ready)
                waiting.add_metric(labels, engine.state.waiting_tokens)
        yield from (restarts, ready, waiting, discarded)


Rows = list[tuple[list[str], State]]


def _running(state: State) -> float:
    return state.running


def _waiting(state: State) -> float:
    return state.waiting


def _usage(state: State) -> float:
    return 1 - state.free_blocks / state.num_blocks if state.num_blocks else 0


def _gauge(name: str, about: str, rows: Rows, read: object) -> Metric:
    assert callable(read)
    family = GaugeMetricFamily(VLLM + name, about, labels=LABELS)
    for labels, state in rows:
        family.add_metric(labels, read(state))
    return family


def _cache_config(rows: Rows) -> Metric:
    labels = [*LABELS, "block_size", "num_gpu_blocks", "cache_dtype"]
    family = GaugeMetricFamily(VLLM + "cache_config_info", "The KV cache's shape", labels=labels)
    for names, state in rows:
        shape = [str(state.block_size), str(state.num_blocks), state.facts.get("dtype", "")]
        family.add_metric([*names, *shape], 1)
    return family


def _lora_info(rows: Rows) -> Metric:
    labels = [*LABELS, "max_lora", "running_lora_adapters", "waiting_lora_adapters"]
    family = GaugeMetricFamily(VLLM + "lora_requests_info", "LoRA adapters in use", labels=labels)
    for names, _ in rows:
        family.add_metric([*names, "0", "", ""], 1)
    return family


class Metrics:
    """All metrics of one server, in a registry of their own."""

    def __init__(self, models: ModelRegistry) -> None:
        self.registry = CollectorRegistry()
        inner = CollectorRegistry()
        self._models = models
        self._families = Families(inner, max(model.max_model_len for model in models.models))
        inner.register(EngineStates(models))
        self.registry.register(Twice(inner))
        self._http = HttpMetrics(self.registry)
        self._engines: dict[tuple[str, int], EngineMetrics] = {}
        for model in models.models:
            for number, engine in enumerate(model.engines):
                metrics = EngineMetrics(self._families, model.name, number)
                engine.observers.append(metrics.observe)
                self._engines[model.name, number] = metrics
        self.registry.register(OwnStates(models, self._engines))

    def of(self, model: ServedModel, engine: Engine) -> EngineMetrics:
        return self._engines[model.name, list(model.engines).index(engine)]

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
                f"{OWN}requests_{outcome}", f"Requests for tokens that {outcome}", registry=registry
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
        self.first_token = self._histogram("time_to_first_token_seconds", FIRST_TOKEN)
        self.inter_token = self._histogram("inter_token_latency_seconds", PER_TOKEN)
        self.per_token = self._histogram("request_time_per_output_token_seconds", PER_TOKEN)
        self.per_token_old = self._histogram("time_per_output_token_seconds", PER_TOKEN)
        self.whole = self._histogram("e2e_request_latency_seconds", WHOLE)
        self.queue = self._histogram("request_queue_time_seconds", WHOLE)
        self.inference = self._histogram("request_inference_time_seconds", WHOLE)
        self.prefill = self._histogram("request_prefill_time_seconds", WHOLE)
        self.decode = self._histogram("request_decode_time_seconds", WHOLE)
        self.prompt_length = self._histogram("request_prompt_tokens", tokens)
        self.answer_length = self._histogram("request_generation_tokens", tokens)
        self.step_tokens = self._histogram("iteration_tokens_total", STEP_TOKENS)

    def _counter(self, name: str, about: str, *labels: str) -> Counter:
        return Counter(VLLM + name, about, [*LABELS, *labels], registry=self._registry)

    def _histogram(self, name: str, buckets: list[float] | list[int]) -> Histogram:
        about = name.replace("_", " ")
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
