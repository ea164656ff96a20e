"""Usage by key, for Prometheus; the keys' names are the operator's."""

from __future__ import annotations

from typing import NamedTuple, get_args

from prometheus_client import CollectorRegistry, Counter

from service.api.exchange import Outcome
from service.collectors import OWN
from service.ledger.record import Record

MAX_NAMES = 1_000  # label values; past it usage is counted under OTHERS
OTHERS = "other"
NOBODY = "none"  # the caller of a server without keys


class UsageMetrics:
    """A key's counters are bound once: noting costs no lookup of labels."""

    def __init__(self, registry: CollectorRegistry, max_names: int = MAX_NAMES) -> None:
        def counter(name: str, about: str, *more: str) -> Counter:
            return Counter(f"{OWN}key_{name}", about, ["key", *more], registry=registry)

        self._max_names = max_names
        self._by_name: dict[str, KeyCounters] = {}
        self._requests = counter("requests", "Requests ended, by key", "outcome")
        self._prompt = counter("prompt_tokens", "Prompt tokens computed, by key")
        self._generated = counter("generation_tokens", "Tokens told to clients, by key")
        self._discarded = counter("discarded_tokens", "Tokens drawn in vain, by key")

    def note(self, record: Record, outcome: Outcome) -> None:
        counters = self._of(record.key_name or NOBODY)
        counters.requests[outcome].inc()
        counters.prompt.inc(record.prompt_tokens)
        counters.generated.inc(record.generated_tokens)
        counters.discarded.inc(record.discarded_tokens)

    def _of(self, name: str) -> KeyCounters:
        if (known := self._by_name.get(name)) is not None:
            return known
        if name != OTHERS and len(self._by_name) >= self._max_names:
            return self._of(OTHERS)
        counters = self._by_name[name] = KeyCounters(
            {outcome: self._requests.labels(name, outcome) for outcome in get_args(Outcome)},
            self._prompt.labels(name),
            self._generated.labels(name),
            self._discarded.labels(name),
        )
        return counters


class KeyCounters(NamedTuple):
    requests: dict[Outcome, Counter]
    prompt: Counter
    generated: Counter
    discarded: Counter
