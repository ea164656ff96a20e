"""Latency over throughput as a picture: PNG or SVG, by matplotlib where it is installed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from service.bench.problem import BenchProblem
from service.bench.summary import Spread, Summary

SUFFIXES = (".png", ".svg")
LINES = {"concurrency": "-", "rate": "--"}
SHARES = {"p50": "#1b6ca8", "p90": "#e08a1e", "p99": "#b3261e"}


def check(path: Path) -> None:
    """Raises ``BenchProblem`` before anything is measured for a picture that cannot be made."""
    if path.suffix.lower() not in SUFFIXES:
        raise BenchProblem(f"{path.name}: a plot is written as {' or '.join(SUFFIXES)}")
    if not path.resolve().parent.is_dir():
        raise BenchProblem(f"{path.parent} is no folder to write a plot into")
    try:
        import matplotlib  # noqa: F401 (only whether it is there)
    except ImportError:
        raise BenchProblem(
            "--plot needs matplotlib: pip install '.[bench]' or pip install matplotlib"
        ) from None


def draw(levels: Sequence[Summary], title: str, path: Path) -> None:
    """One point a level; levels without a single answer are left out."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    answered = [level for level in levels if level.num_good]
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    first, between = figure.subplots(1, 2)
    _curves(first, answered, [level.ttft for level in answered], "time to first token")
    _curves(between, answered, [level.itl for level in answered], "time between tokens")
    figure.suptitle(title)
    figure.savefig(path, dpi=144)


def _curves(axes: Any, levels: Sequence[Summary], spreads: Sequence[Spread], name: str) -> None:
    for kind, line in LINES.items():
        own = [place for place, level in enumerate(levels) if level.kind == kind]
        rates = [levels[place].output_tokens_per_second for place in own]
        for share, color in SHARES.items():
            times = [_milliseconds(spreads[place], share) for place in own]
            label = share if own and own[0] == 0 else None
            axes.plot(rates, times, line, marker="o", color=color, label=label)
    for level, spread in zip(levels, spreads, strict=True):
        unit = "" if level.kind == "concurrency" else "/s"
        place = (level.output_tokens_per_second, _milliseconds(spread, "p99"))
        axes.annotate(f"{level.level:g}{unit}", place, (0, 6), textcoords="offset points")
    highest = max((_milliseconds(spread, "p99") for spread in spreads), default=0.0)
    axes.set(xlabel="output tokens a second", ylabel=f"{name}, ms")
    axes.set_xlim(left=0)
    axes.set_ylim(0, 1.15 * highest or 1.0)
    axes.grid(alpha=0.3)
    if levels:
        axes.legend(loc="upper left")


def _milliseconds(spread: Spread, share: str) -> float:
    return 1e3 * (getattr(spread, share) or 0.0)
