"""What is read only when Prometheus scrapes: the engines' own figures, and each family twice."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.datastructures import State as AppState

from service.engine.messages import State
from service.http.connections import REASONS, Connections
from service.registry import ModelRegistry

if TYPE_CHECKING:
    from service.ledger.ledger import Ledger
    from service.metrics import EngineMetrics
    from service.tracing.exporting import Deliveries

VLLM, OWN = "vllm:", "pronk:"
LABELS = ["model_name", "engine"]

# metric: (the worker's counter in State.counters, what it counts)
ENGINE_COUNTERS = {
    "num_preemptions": ("preemptions", "Sequences put back to the queue for want of blocks"),
    "prefix_cache_queries": ("prefix_queries", "Prompt tokens looked up in the prefix cache"),
    "prefix_cache_hits": ("prefix_hits", "Prompt tokens found in the prefix cache"),
    "spec_decode_num_drafts": ("spec_drafts", "Speculations made"),
    "spec_decode_num_draft_tokens": ("spec_draft_tokens", "Tokens speculated"),
    "spec_decode_num_accepted_tokens": ("spec_accepted_tokens", "Speculated tokens accepted"),
}


# The same for what vLLM has no name for.
OWN_COUNTERS = {
    "fair_preemptions": ("yields", "Preemptions that let a key below its share run"),
    "host_cache_hits": ("host_hits", "Prompt tokens found in host memory alone"),
    "host_cache_stores": ("host_stores", "Pages evicted from the KV cache to host memory"),
    "host_cache_loads": ("host_loads", "Pages brought back from host memory"),
    "host_cache_evictions": ("host_evictions", "Pages that left host memory for others"),
}


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
            OWN + "engine_restarts",
            "Engine processes started anew, by why the one before had ended",
            labels=[*LABELS, "reason"],
        )
        retried = CounterMetricFamily(
            OWN + "retried_requests",
            "Requests sent to a second engine because the first one died over them",
            labels=LABELS,
        )
        poisonous = CounterMetricFamily(
            OWN + "poisonous_requests", "Refusals of what ended the engine twice", labels=LABELS
        )
        ready = GaugeMetricFamily(OWN + "engine_ready", "1 while it takes work", labels=LABELS)
        waiting = GaugeMetricFamily(
            OWN + "waiting_prompt_tokens", "Prompt tokens in the queue", labels=LABELS
        )
        discarded = CounterMetricFamily(
            OWN + "discarded_tokens", "Tokens drawn that no client was told", labels=LABELS
        )
        usage = GaugeMetricFamily(
            OWN + "host_cache_usage_perc",
            "Share of the host memory for evicted pages in use, 0..1",
            labels=LABELS,
        )
        counted = {
            name: (counter, CounterMetricFamily(OWN + name, about, labels=LABELS))
            for name, (counter, about) in OWN_COUNTERS.items()
        }
        steps = CounterMetricFamily(
            OWN + "engine_step_seconds",
            "From one step's end to the next one's, idle time left out",
            labels=LABELS,
        )
        gaps = CounterMetricFamily(
            OWN + "engine_gap_seconds",
            "Of engine_step_seconds, outside the network: scheduling, sampling, messages",
            labels=LABELS,
        )
        for model in self.models.models:
            for number, engine in enumerate(model.engines):
                labels = [model.name, str(number)]
                usage.add_metric(labels, _host_usage(engine.state))
                for counter, family in counted.values():
                    family.add_metric(labels, engine.state.counters.get(counter, 0))
                dropped = self.metrics[model.name, number].num_dropped + engine.num_discarded
                counters = engine.state.counters
                in_engine = counters.get("discarded_tokens", 0)
                discarded.add_metric(labels, dropped + in_engine)
                for reason, count in engine.restarts.items():
                    restarts.add_metric([*labels, reason], count)
                retried.add_metric(labels, engine.num_retried)
                poisonous.add_metric(labels, engine.num_poisonous)
                ready.add_metric(labels, engine.is_ready)
                waiting.add_metric(labels, engine.state.waiting_tokens)
                steps.add_metric(labels, counters.get("step_seconds", 0))
                gaps.add_metric(labels, counters.get("gap_seconds", 0))
        yield from (restarts, retried, poisonous, ready, waiting, discarded, usage, steps, gaps)
        yield from (family for _, family in counted.values())


class ConnectionStates(Collector):
    """The listener's connections, and what the event loop holds: what a leak would show in."""

    def __init__(self, book: Connections) -> None:
        self.book = book

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        held = GaugeMetricFamily(
            OWN + "connections", "Connections held, by whether they wait", labels=["state"]
        )
        waiting = self.book.num_waiting
        held.add_metric(["waiting"], waiting)
        held.add_metric(["answering"], self.book.num_open - waiting)
        yield held
        ended = CounterMetricFamily(
            OWN + "connections_ended", "Connections this side cut short", labels=["reason"]
        )
        for reason in REASONS:
            ended.add_metric([reason], self.book.ended[reason])
        yield ended
        tasks = GaugeMetricFamily(OWN + "event_loop_tasks", "Tasks of the HTTP process")
        tasks.add_metric([], len(asyncio.all_tasks()))
        yield tasks


class LedgerState(Collector):
    """How the usage ledger fares; absent where none is kept."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        ledger = self.ledger
        yield CounterMetricFamily(
            OWN + "ledger_records", "Usage records written", value=ledger.num_written
        )
        yield CounterMetricFamily(
            OWN + "ledger_dropped", "Usage records lost for want of room", value=ledger.num_dropped
        )
        yield GaugeMetricFamily(
            OWN + "ledger_unwritten", "Usage records that wait", value=ledger.num_unwritten
        )
        yield GaugeMetricFamily(
            OWN + "ledger_writable", "0 while its file refuses", value=ledger.trouble is None
        )


class DrainState(Collector):
    def __init__(self, flags: AppState) -> None:
        self.flags = flags

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        draining = GaugeMetricFamily(OWN + "draining", "1 once the server was told to end")
        draining.add_metric([], bool(self.flags.draining))
        yield draining


class TraceState(Collector):
    """Where the spans went; absent where nothing is traced."""

    def __init__(self, deliveries: Deliveries) -> None:
        self.deliveries = deliveries

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        yield CounterMetricFamily(
            OWN + "trace_spans_exported",
            "Spans the collector took",
            value=self.deliveries.num_exported,
        )
        yield CounterMetricFamily(
            OWN + "trace_spans_lost",
            "Spans it refused, or was not there for",
            value=self.deliveries.num_lost,
        )


Rows = list[tuple[list[str], State]]


def _running(state: State) -> float:
    return state.running


def _waiting(state: State) -> float:
    return state.waiting


def _usage(state: State) -> float:
    return 1 - state.free_blocks / state.num_blocks if state.num_blocks else 0


def _host_usage(state: State) -> float:
    return state.used_host_blocks / state.host_blocks if state.host_blocks else 0


def _gauge(name: str, about: str, rows: Rows, read: Callable[[State], float]) -> Metric:
    family = GaugeMetricFamily(VLLM + name, about, labels=LABELS)
    for labels, state in rows:
        family.add_metric(labels, read(state))
    return family


def _cache_config(rows: Rows) -> Metric:
    labels = [*LABELS, "block_size", "num_gpu_blocks", "cache_dtype"]
    family = GaugeMetricFamily(VLLM + "cache_config_info", "The KV cache's shape", labels=labels)
    for names, state in rows:
        shape = [
            str(state.block_size),
            str(state.num_blocks),
            state.facts.get("kv_cache_dtype", ""),
        ]
        family.add_metric([*names, *shape], 1)
    return family


def _lora_info(rows: Rows) -> Metric:
    labels = [*LABELS, "max_lora", "running_lora_adapters", "waiting_lora_adapters"]
    family = GaugeMetricFamily(VLLM + "lora_requests_info", "LoRA adapters in use", labels=labels)
    for names, state in rows:
        running, waiting = ",".join(state.running_adapters), ",".join(state.waiting_adapters)
        family.add_metric([*names, str(state.max_loras), running, waiting], 1)
    return family
