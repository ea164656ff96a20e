"""What one server says of itself at one moment: its readiness and its metrics."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import httpx
from prometheus_client.parser import text_string_to_metric_families

OWN = "pronk:"
TIMEOUT = 5.0
LONGEST = 200  # characters of a reason


class TopProblem(RuntimeError):
    """There is nothing to show; the text says why in one line."""


@dataclass(frozen=True)
class Readiness:
    is_ready: bool
    stage: str
    progress: float = 1.0
    reason: str = ""


@dataclass(frozen=True)
class Sample:
    """``series``: by name and labels, those of pronk's own prefix, without it."""

    moment: float  # time.monotonic()
    readiness: Readiness
    series: Mapping[str, Mapping[tuple[tuple[str, str], ...], float]]

    def rows(self, name: str) -> Iterator[tuple[dict[str, str], float]]:
        for labels, value in self.series.get(name, {}).items():
            yield dict(labels), value

    def total(self, name: str, **wanted: str) -> float:
        return sum(
            value
            for labels, value in self.rows(name)
            if all(labels.get(key) == one for key, one in wanted.items())
        )

    def by(self, name: str, label: str) -> dict[str, float]:
        """Sums by one label's values."""
        found: dict[str, float] = {}
        for labels, value in self.rows(name):
            key = labels.get(label, "")
            found[key] = found.get(key, 0) + value
        return found


def client_of(url: str, api_key: str) -> httpx.Client:
    if "://" not in url:
        url = f"http://{url}"
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise TopProblem(f"{url} is no URL: {error}") from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise TopProblem(f"{url} is no http or https URL")
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    return httpx.Client(base_url=url, headers=headers, timeout=TIMEOUT)


def scrape(client: httpx.Client) -> Sample:
    """Raises ``TopProblem``: nobody there, no pronk, or the key does not open its metrics."""
    where = str(client.base_url).rstrip("/")
    try:
        ready, metrics = client.get("/readyz"), client.get("/metrics")
    except httpx.TimeoutException:
        raise TopProblem(f"{where} does not answer within {TIMEOUT:g} s") from None
    except httpx.HTTPError as error:
        why = re.sub(r"^\[Errno -?\d+\] ", "", plain(str(error)))
        raise TopProblem(f"{where} cannot be reached: {why}") from None
    if metrics.status_code == 401:
        raise TopProblem(f"{where} wants an API key: --api-key or PRONK_API_KEY")
    if metrics.status_code == 403:
        raise TopProblem(
            f"{where} shows its metrics to admin keys only; this key has no such right"
        )
    if metrics.status_code != 200:
        raise TopProblem(f"{where} answers /metrics with {metrics.status_code}: is it pronk?")
    return Sample(time.monotonic(), _readiness(ready), _series(metrics.text, where))


def _series(text: str, where: str) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name.startswith(OWN):
                    labels = tuple(sorted(sample.labels.items()))
                    found.setdefault(sample.name.removeprefix(OWN), {})[labels] = sample.value
    except ValueError:
        raise TopProblem(f"{where}/metrics cannot be read: is it pronk?") from None
    if not found:
        raise TopProblem(f"{where}/metrics has nothing of pronk's")
    return found


def _readiness(response: httpx.Response) -> Readiness:
    try:
        told = response.json()
        return Readiness(
            response.status_code == 200,
            plain(str(told["stage"])),
            float(told["progress"]),
            plain(str(told["reason"])),
        )
    except (ValueError, KeyError, TypeError):
        return Readiness(response.status_code == 200, "unknown")


def plain(text: str) -> str:
    """What a server says may be a name that somebody chose to drive this terminal."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text[:LONGEST])
