"""docs/metrics.md: every family that a server's registry holds, as it says itself."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

from prometheus_client import Metric

from service.api.app import create_app
from service.collectors import OWN, VLLM, LedgerState
from service.engine.client import EngineClient
from service.engine.options import EngineOptions
from service.http.connections import Connections
from service.registry import ModelRegistry, ServedModel
from service.settings import Settings
from service.tracing.exporting import Deliveries

CONTEXT = 131_072  # of the model the page is written for
HEAD = """# Metrics

<!-- Written by `python -m docs.generate`; change the metrics' own words instead. -->

`GET /metrics` answers in Prometheus' text format, for admin keys (or anybody, with
`--metrics-public`). Every label's values are bounded: names of models, reasons, routes as
templates, the operator's names of keys (1,000 of them, then `other`). `pronk top` shows the same
figures in a terminal.

Received = finished + failed + cancelled + rejected, plus those in flight, always.

"""
BOTH = """## What dashboards for vLLM ask for, under `vllm:` and `pronk:`

Labels: `model_name` (the first name it is served by), `engine` (0), and those in the table.

"""
ALONE = "\n## pronk's own\n\n"
HTTP = "\n## HTTP\n\n"
COLUMNS = "| metric | type | labels | meaning |\n|---|---|---|---|\n"
LABELS = ("model_name", "engine")


def metrics_page() -> str:
    families = asyncio.run(collected())
    shared = [f for f in families if f.name.startswith(VLLM)]
    twins = {OWN + f.name.removeprefix(VLLM) for f in shared}
    own = [f for f in families if f.name.startswith(OWN) and f.name not in twins]
    http = [f for f in families if not f.name.startswith((VLLM, OWN))]
    parts = [HEAD, BOTH, COLUMNS, *map(line, shared), "\n", buckets(shared)]
    parts += [ALONE, COLUMNS, *map(line, own), HTTP, COLUMNS, *map(line, http)]
    return "".join(parts)


async def collected() -> list[Metric]:
    """Of a server with every part there is; nothing of it runs."""
    engine = EngineClient(EngineOptions(model="", socket=""))
    app = create_app(Settings(), ModelRegistry([ServedModel(["model"], [engine], CONTEXT)]))
    metrics = app.state.server.metrics
    metrics.watch_connections(Connections(1))
    metrics.watch_traces(Deliveries(None))  # type: ignore[arg-type]
    ledger = SimpleNamespace(num_written=0, num_dropped=0, num_unwritten=0, trouble=None)
    metrics.registry.register(LedgerState(ledger))  # type: ignore[arg-type]
    families = list(metrics.registry.collect())
    for family in families:
        family.own_labels = labels_of(family, metrics.registry)
    return families


def labels_of(family: Metric, registry: object) -> tuple[str, ...]:
    """From its samples, or from what made it where it has none yet."""
    for sample in family.samples:
        return tuple(name for name in sample.labels if name != "le")
    if declared := getattr(family, "_labelnames", ()):
        return tuple(declared)
    collector = registry._names_to_collectors.get(family.name)  # type: ignore[attr-defined]
    return tuple(getattr(collector, "_labelnames", ()))


def line(family: Metric) -> str:
    name = family.name + ("_total" if family.type == "counter" else "")
    name = name.removeprefix(VLLM)
    labels = ", ".join(f"`{label}`" for label in family.own_labels if label not in LABELS)
    if family.name.startswith(OWN) and set(LABELS) <= set(family.own_labels):
        labels = ", ".join(filter(None, ("`model_name`, `engine`", labels)))
    return f"| `{name}` | {family.type} | {labels} | {family.documentation} |\n"


def buckets(families: list[Metric]) -> str:
    """Histograms that share them in one line."""
    found: dict[str, list[str]] = {}
    for family in families:
        bounds = [s.labels["le"] for s in family.samples if "le" in s.labels]
        if bounds:
            shown = " ".join(f"{float(bound):g}" for bound in bounds)
            found.setdefault(shown, []).append(f"`{family.name.removeprefix(VLLM)}`")
    lines = [f"- {', '.join(names)}: {bounds}" for bounds, names in found.items()]
    return (
        "Buckets:\n\n"
        + "\n".join(lines)
        + f"\n\nToken counts go up to the context, here {CONTEXT:,}.\n"
    )
