"""Figures as a person reads them: a panel for each server, a table of keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.box import ROUNDED, SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from service.top.figures import Figures, KeyFigures, Quantiles

BARS = "▁▂▃▄▅▆▇█"
SPARKS = 24  # intervals
MOST_KEYS = 12
NOTHING = Text("-", style="dim")
STAGES = {"ready": "green", "draining": "yellow", "failed": "red", "unreachable": "red"}


def screen(
    servers: Sequence[Figures],
    histories: Mapping[str, Sequence[tuple[float, float]]],
    window: float,
) -> RenderableType:
    """``histories``: by server, tokens a second out and in, oldest first."""
    parts: list[RenderableType] = []
    if len(servers) > 1:
        parts.append(summary(servers))
    parts += [panel(one, histories.get(one.url, ())) for one in servers]
    if keys := merged(servers):
        parts.append(key_table(keys, window))
    return Group(*parts)


def summary(servers: Sequence[Figures]) -> Text:
    ready = sum(one.readiness.is_ready for one in servers)
    return Text.assemble(
        f" {len(servers)} servers, ",
        (f"{ready} ready", "green" if ready == len(servers) else "yellow"),
        f"   {_count(sum(one.running for one in servers))} running",
        f"   {_count(sum(one.waiting for one in servers))} waiting   ",
        (_count(sum(one.generation_rate for one in servers)), "bold"),
        " tok/s out   ",
        (_count(sum(one.prompt_rate for one in servers)), "bold"),
        " tok/s in",
    )


def panel(one: Figures, history: Sequence[tuple[float, float]]) -> Panel:
    color = STAGES.get(one.readiness.stage, "yellow")
    title = Text.assemble(
        (" pronk ", "bold"), (one.url, "cyan"), " ", (", ".join(one.models), "bold"), " "
    )
    state = Text.assemble(" ", ("● ", color), (_stage(one), color), " ")
    body: RenderableType = Text(one.trouble, style="red") if one.trouble else _body(one, history)
    return Panel(
        body,
        title=title,
        title_align="left",
        subtitle=state,
        subtitle_align="left",
        border_style=color if one.trouble or not one.readiness.is_ready else "dim",
        box=ROUNDED,
    )


def _stage(one: Figures) -> str:
    readiness = one.readiness
    progress = f" {readiness.progress:.0%}" if 0 < readiness.progress < 1 else ""
    reason = f": {readiness.reason}" if readiness.reason else ""
    return f"{readiness.stage.replace('_', ' ')}{progress}{reason}"


def _body(one: Figures, history: Sequence[tuple[float, float]]) -> Group:
    outs, ins = [out for out, _ in history], [into for _, into in history]
    both = Table.grid(padding=(0, 3), expand=True)
    both.add_column(ratio=1)
    both.add_column(ratio=1)
    load, speed = _pairs(), _pairs()
    queued = f"  {_count(one.waiting_tokens)} tokens" if one.waiting else ""
    load.add_row("running", Text.assemble((_count(one.running), "bold")))
    load.add_row("waiting", Text.assemble((_count(one.waiting), "bold"), (queued, "dim")))
    load.add_row("KV cache", bar(one.kv_usage))
    if one.host_usage:
        load.add_row("host cache", bar(one.host_usage))
    load.add_row("prefix hits", _share(one.prefix_hit_rate))
    load.add_row("requests", Text(f"{one.request_rate:.1f}/s  {_count(one.in_flight)} in flight"))
    if one.connections is not None:
        load.add_row("connections", Text(_count(one.connections)))
    speed.add_row("out", Rate(one.generation_rate, outs, "green"))
    speed.add_row("in", Rate(one.prompt_rate, ins, "blue"))
    speed.add_row("first token", _latency(one.first_token))
    speed.add_row("next token", _latency(one.inter_token))
    speed.add_row("in queue", _mean(one.queue_mean))
    speed.add_row("rejected", _rejected(one))
    speed.add_row("restarts", _counted(one.restarts, f"{_count(one.retried)} retried", one.retried))
    both.add_row(load, speed)
    return Group(both, Text(f"since its start: {_ended(one)}", style="dim"))


def _ended(one: Figures) -> str:
    shown = ("finished", "failed", "cancelled")
    counts = [f"{_count(one.outcomes.get(name, 0))} {name}" for name in shown]
    return ", ".join([*counts, f"{_count(one.preemptions)} preempted"])


def _pairs() -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True, min_width=11)
    grid.add_column()  # may shrink: what is too long for it is cut
    return grid


def bar(share: float, width: int = 14) -> Text:
    share = min(1.0, max(0.0, share))
    color = "green" if share < 0.7 else "yellow" if share < 0.9 else "red"
    full = round(share * width)
    return Text.assemble(("█" * full, color), ("░" * (width - full), "dim"), f" {share:.0%}")


@dataclass(frozen=True)
class Rate:
    """A number and its history, as far back as there is room for."""

    rate: float
    history: Sequence[float]
    color: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        told = Text.assemble((f"{_count(self.rate):>7}", "bold"), " tok/s ")
        room = min(SPARKS, max(0, options.max_width - len(told)))
        told.append(sparkline(self.history[-room:] if room else ()), self.color)
        yield told

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(14, 14 + SPARKS)


def sparkline(values: Sequence[float]) -> str:
    shown = list(values)
    most = max(shown, default=0.0)
    if most <= 0:
        return ""
    return "".join(BARS[min(len(BARS) - 1, int(value / most * len(BARS)))] for value in shown)


def _latency(found: Quantiles) -> Text:
    if found.p50 is None:
        return NOTHING
    return Text.assemble((f"{duration(found.p50):>7}", "bold"), "  p95 ", duration(found.p95))


def _mean(seconds: float | None) -> Text:
    return NOTHING if seconds is None else Text(f"{duration(seconds):>7}  on average")


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms" if seconds < 0.1 else f"{seconds * 1000:.0f} ms"
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds:.0f} s"


def _share(share: float | None) -> Text:
    return NOTHING if share is None else Text(f"{share:.0%}")


def _rejected(one: Figures) -> Text:
    rate = f"{one.rejection_rate:.1f}/s" if one.rejection_rate else ""
    return _counted(one.rejections, rate, one.rejection_rate)


def _counted(counts: Mapping[str, float], beside: str, is_worth_it: float) -> Text:
    """A sum, and what it is made of."""
    total = sum(counts.values())
    parts = ", ".join(f"{name} {_count(count)}" for name, count in counts.items())
    told = "  ".join(filter(None, (parts, beside if is_worth_it else "")))
    color = "bold red" if total else "bold"
    return Text.assemble((_count(total), color), (f"  {told}", "dim"), no_wrap=True)


def merged(servers: Sequence[Figures]) -> list[KeyFigures]:
    """Each key over all servers, the busiest first."""
    found: dict[str, KeyFigures] = {}
    for key in (key for one in servers for key in one.keys):
        known = found.get(key.name, KeyFigures(key.name))
        found[key.name] = KeyFigures(
            key.name,
            known.requests + key.requests,
            known.rejections + key.rejections,
            known.request_rate + key.request_rate,
            known.prompt_rate + key.prompt_rate,
            known.generation_rate + key.generation_rate,
        )
    return sorted(found.values(), key=lambda key: (-key.generation_rate, -key.requests, key.name))


def key_table(keys: Sequence[KeyFigures], window: float) -> Table:
    left_out = len(keys) - MOST_KEYS
    caption = f"and {left_out} more" if left_out > 0 else None
    table = Table(box=SIMPLE_HEAD, expand=True, caption=caption, caption_justify="left")
    table.add_column("key", ratio=1, overflow="ellipsis", no_wrap=True)
    for heading in ("out tok/s", "in tok/s", f"req/s ({window:.0f} s)", "requests", "refused"):
        table.add_column(heading, justify="right", no_wrap=True)
    for key in keys[:MOST_KEYS]:
        table.add_row(
            Text(key.name),
            Text(_count(key.generation_rate), style="bold"),
            _count(key.prompt_rate),
            f"{key.request_rate:.1f}",
            _count(key.requests),
            Text(_count(key.rejections), style="red" if key.rejections else "dim"),
        )
    return table


def _count(value: float) -> str:
    if value >= 10_000_000:
        return f"{value / 1e6:,.0f}M"
    return f"{value:,.0f}" if value >= 10 or value == int(value) else f"{value:.1f}"
