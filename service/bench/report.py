"""What a benchmark found: JSON to keep, a table to read."""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from service.bench.problem import BenchProblem
from service.bench.summary import Spread, Summary

FORMAT = 1  # of the JSON; rises when a field changes its meaning


class Server(Struct, frozen=True):
    """Who was measured, where it tells."""

    url: str
    model: str = ""  # the first id of /v1/models
    software: str = ""  # the Server header
    version: str = ""


class ServeReport(Struct, frozen=True):
    """The result of ``pronk bench serve``."""

    command: str
    date: str
    machine: str
    server: Server
    settings: dict[str, Any]
    levels: list[Summary]
    format: int = FORMAT


def write_json(report: Struct, path: Path) -> None:
    text = msgspec.json.format(msgspec.json.encode(report), indent=1)
    try:
        path.write_bytes(text + b"\n")
    except OSError as error:
        raise BenchProblem(f"{path} cannot be written: {error.strerror}") from None


def command_line(words: Sequence[str] | None = None) -> str:
    """The command as typed, less a key that stands in it."""
    shown = ["pronk", *(sys.argv[1:] if words is None else words)]
    for place, word in enumerate(shown):
        if word.startswith("--api-key="):
            shown[place] = "--api-key=..."
        elif word == "--api-key" and place + 1 < len(shown):
            shown[place + 1] = "..."
    return " ".join(f"'{word}'" if " " in word or not word else word for word in shown)


def now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def machine() -> str:
    """Processor, its cores, the system."""
    from service.engine.machine import usable_cores

    return f"{processor()}, {usable_cores()} cores, {platform.system()} {platform.machine()}"


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or "unknown processor"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns of one width each, the first to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


SERVE_HEAD = (
    *("", "out tok/s", "req/s", "TTFT p50", "p90", "p99", "ITL p50", "p90", "p99"),
    *("E2E p50", "p99", "tokens", "ok", "429", "failed"),
)


def serve_table(levels: Sequence[Summary]) -> str:
    """Times in milliseconds."""
    return table([SERVE_HEAD, *map(serve_row, levels)])


def serve_row(found: Summary) -> tuple[str, ...]:
    label = f"{found.level:g} {'streams' if found.kind == 'concurrency' else 'req/s'}"
    return (
        label,
        f"{found.output_tokens_per_second:.1f}",
        f"{found.requests_per_second:.2f}",
        *_milliseconds(found.ttft),
        *_milliseconds(found.itl),
        milliseconds(found.e2e.p50),
        milliseconds(found.e2e.p99),
        str(found.output_tokens),
        str(found.num_good),
        str(found.num_refused),
        str(found.num_failed),
    )


def _milliseconds(spread: Spread) -> tuple[str, str, str]:
    return milliseconds(spread.p50), milliseconds(spread.p90), milliseconds(spread.p99)


def milliseconds(seconds: float | None) -> str:
    """Three digits that matter; a dash for what was not measured."""
    if seconds is None:
        return "-"
    return f"{1e3 * seconds:.1f}" if seconds < 0.1 else f"{1e3 * seconds:.0f}"
