"""What Prometheus reads of the keys. Labels are the operator's names, nothing that callers send."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from service.errors import AdminRequired, ModelNotAllowed, PronkError, RateLimited
from service.keys.keyring import Keyring

OWN = "pronk:"


class KeyMetrics:
    """``key`` is empty where none was known: a stranger's."""

    def __init__(self, registry: CollectorRegistry, keyring: Keyring) -> None:
        self._rejections = Counter(
            OWN + "key_rejections",
            "Requests refused for want of a key, a right, a rate or a quota",
            ["key", "reason"],
            registry=registry,
        )
        registry.register(KeyringState(keyring))

    def reject(self, name: str, reason: str) -> None:
        self._rejections.labels(name, reason).inc()

    def note(self, name: str, error: PronkError) -> None:
        """Count what was refused for want of a right, a rate or a quota."""
        if isinstance(error, AdminRequired):
            self.reject(name, "admin")
        elif isinstance(error, ModelNotAllowed):
            self.reject(name, "model")
        elif isinstance(error, RateLimited):
            self.reject(name, error.limit)


class KeyringState(Collector):
    """Read when it is scraped."""

    def __init__(self, keyring: Keyring) -> None:
        self._keyring = keyring

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        keyring = self._keyring
        usable = [k for k in keyring.keys if not k.disabled and not k.is_expired(keyring.clock())]
        yield GaugeMetricFamily(
            OWN + "keys", "API keys that open, the server's own among them", value=len(usable)
        )
        yield GaugeMetricFamily(
            OWN + "keys_file_ok",
            "0 while the keys file cannot be read and the keys read before stay in force",
            value=int(keyring.is_current),
        )
        yield CounterMetricFamily(
            OWN + "keys_reloads", "Changes of the keys file taken", value=keyring.num_reloads
        )
