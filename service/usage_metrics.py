"""Usage by key, for Prometheus; the keys' names are the operator's."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter

from service.api.exchange import Outcome
from service.collectors import OWN
from service.ledger.record import Record

MAX_NAMES = 1_000  # label values; past it usage is counted under OTHERS
OTHERS = "other"
NOBODY = "none"  # the caller of a server without keys


class UsageMetrics:
    def __init__(self, registry: CollectorRegistry, max_names: int = MAX_NAMES) -> None:
        def counter(name: str, about: str, *more: str) -> Counter:
            return Counter(f"{OWN}key_{name}", about, ["key", *more], registry=registry)

        self._max_names = max_names
        self._names: set[str] = set()
        self._requests = counter("requests", "Requests ended, by key", "outcome")
        self._prompt = counter("prompt_tokens", "Prompt tokens computed, by key")
        self._generated = counter("generation_tokens", "Tokens told to clients, by key")
        self._discarded = counter("discarded_tokens", "Tokens drawn in vain, by key")

    def note(self, record: Record, outcome: Outcome) -> None:
        name = self._label(record.key_name)
        self._requests.labels(name, outcome).inc()
        self._prompt.labels(name).inc(record.prompt_tokens)
        self._generated.labels(name).inc(record.generated_tokens)
        self._discarded.labels(name).inc(record.discarded_tokens)

    def _label(self, name: str) -> str:
        name = name or NOBODY
        if name not in self._names and len(self._names) < self._max_names:
            self._names.add(name)
        return name if name in self._names else OTHERS
