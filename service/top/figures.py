"""Two samples of a server's metrics become what a person wants to know."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from service.top.scrape import Readiness, Sample, plain


@dataclass(frozen=True)
class Quantiles:
    """Seconds; None where nothing was observed."""

    p50: float | None = None
    p95: float | None = None


@dataclass(frozen=True)
class KeyFigures:
    """``requests`` and ``rejections`` since the server's start, the rest a second."""

    name: str
    requests: float = 0.0
    rejections: float = 0.0
    request_rate: float = 0.0
    prompt_rate: float = 0.0
    generation_rate: float = 0.0


@dataclass(frozen=True)
class Figures:
    """One server. Rates are a second, over the last interval; quantiles and keys over the window.

    ``trouble``: why there is nothing else.
    """

    url: str
    trouble: str = ""
    readiness: Readiness = field(default_factory=lambda: Readiness(False, "unreachable"))
    models: list[str] = field(default_factory=list)
    running: float = 0
    waiting: float = 0
    waiting_tokens: float = 0
    in_flight: float = 0
    connections: float | None = None
    kv_usage: float = 0.0  # 0..1, of the fullest engine
    host_usage: float = 0.0
    prompt_rate: float = 0.0  # tokens
    generation_rate: float = 0.0
    request_rate: float = 0.0  # that ended
    prefix_hit_rate: float | None = None  # of prompt tokens; None where none were looked up
    first_token: Quantiles = field(default_factory=Quantiles)
    inter_token: Quantiles = field(default_factory=Quantiles)
    queue_mean: float | None = None  # its buckets begin at 0.3 s: quantiles would be guesses
    outcomes: dict[str, float] = field(default_factory=dict)  # since the start, as all below
    rejections: dict[str, float] = field(default_factory=dict)  # by reason
    rejection_rate: float = 0.0
    restarts: dict[str, float] = field(default_factory=dict)
    retried: float = 0
    preemptions: float = 0
    keys: list[KeyFigures] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


OUTCOMES = ("finished", "failed", "cancelled", "rejected")


def figures(url: str, samples: Sequence[Sample]) -> Figures:
    """``samples``: oldest first, the window's; one alone has no rates yet."""
    oldest, newest = samples[0], samples[-1]
    before = samples[-2] if len(samples) > 1 else newest
    last, window = Span(before, newest), Span(oldest, newest)
    models = {labels.get("model_name", "") for labels, _ in newest.rows("num_requests_running")}
    hits, queries = (
        window.grown("prefix_cache_hits_total"),
        window.grown("prefix_cache_queries_total"),
    )
    return Figures(
        url,
        readiness=newest.readiness,
        models=sorted(map(plain, models)),
        running=newest.total("num_requests_running"),
        waiting=newest.total("num_requests_waiting"),
        waiting_tokens=newest.total("waiting_prompt_tokens"),
        in_flight=newest.total("requests_in_flight"),
        connections=newest.total("connections") if "connections" in newest.series else None,
        kv_usage=max((value for _, value in newest.rows("kv_cache_usage_perc")), default=0.0),
        host_usage=max((value for _, value in newest.rows("host_cache_usage_perc")), default=0.0),
        prompt_rate=last.rate("prompt_tokens_total"),
        generation_rate=last.rate("generation_tokens_total"),
        request_rate=sum(last.rate(f"requests_{outcome}_total") for outcome in OUTCOMES),
        prefix_hit_rate=hits / queries if queries else None,
        first_token=window.quantiles("time_to_first_token_seconds"),
        inter_token=window.quantiles("inter_token_latency_seconds"),
        queue_mean=window.mean("request_queue_time_seconds"),
        outcomes={outcome: newest.total(f"requests_{outcome}_total") for outcome in OUTCOMES},
        rejections=_rejections(newest),
        rejection_rate=last.rate("admission_rejections_total") + last.rate("key_rejections_total"),
        restarts=_some(newest.by("engine_restarts_total", "reason")),
        retried=newest.total("retried_requests_total"),
        preemptions=newest.total("num_preemptions_total"),
        keys=list(_keys(window)),
    )


def _rejections(sample: Sample) -> dict[str, float]:
    """For want of room, and for want of a key, a right, a rate or a quota."""
    found = sample.by("admission_rejections_total", "reason")
    for reason, count in sample.by("key_rejections_total", "reason").items():
        found[reason] = found.get(reason, 0) + count
    return _some(found)


def _some(counts: dict[str, float]) -> dict[str, float]:
    return {plain(name): count for name, count in sorted(counts.items()) if count}


def _keys(window: Span) -> list[KeyFigures]:
    """The busiest first. Their counters move when a request has ended."""
    requests = window.newest.by("key_requests_total", "key")
    rejections = window.newest.by("key_rejections_total", "key")
    found = [
        KeyFigures(
            plain(name) or "(stranger)",
            requests.get(name, 0),
            rejections.get(name, 0),
            window.rate("key_requests_total", key=name),
            window.rate("key_prompt_tokens_total", key=name),
            window.rate("key_generation_tokens_total", key=name),
        )
        for name in requests.keys() | rejections.keys()
    ]
    return sorted(found, key=lambda key: (-key.generation_rate, -key.requests, key.name))


@dataclass(frozen=True)
class Span:
    """What grew between two samples; counters that fell began anew with the server."""

    oldest: Sample
    newest: Sample

    @property
    def seconds(self) -> float:
        return self.newest.moment - self.oldest.moment

    def grown(self, name: str, **labels: str) -> float:
        now = self.newest.total(name, **labels)
        then = self.oldest.total(name, **labels)
        return now - then if now >= then else now

    def rate(self, name: str, **labels: str) -> float:
        return self.grown(name, **labels) / self.seconds if self.seconds > 0 else 0.0

    def mean(self, histogram: str) -> float | None:
        count = self.grown(f"{histogram}_count")
        return self.grown(f"{histogram}_sum") / count if count else None

    def quantiles(self, histogram: str) -> Quantiles:
        name = f"{histogram}_bucket"
        bounds = self.newest.by(name, "le")
        before = self.oldest.by(name, "le")
        if any(count < before.get(bound, 0) for bound, count in bounds.items()):
            before = {}
        grown = [(float(bound), count - before.get(bound, 0)) for bound, count in bounds.items()]
        return Quantiles(quantile(0.5, grown), quantile(0.95, grown))


def quantile(share: float, buckets: Sequence[tuple[float, float]]) -> float | None:
    """Of cumulative ``(upper bound, count)``, linear within a bucket, as Prometheus has it; past
    the last finite bound that bound."""
    ordered = sorted(buckets)
    if not ordered or not ordered[-1][1]:
        return None
    rank = share * ordered[-1][1]
    low, below = 0.0, 0.0
    for bound, count in ordered:
        if count >= rank and count > below:
            return (
                low if math.isinf(bound) else low + (bound - low) * (rank - below) / (count - below)
            )
        low, below = bound, count
    return None
