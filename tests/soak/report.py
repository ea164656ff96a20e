"""What a soak showed: numbers, what of them must not be, a page and a picture."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.soak.run import Rest, Soak, Visited

WHEN_BROKEN = {"error event", "http 500", "refused"}  # of a request whose engine was killed
NUM_WINDOWS = 10
SLOPE = 20.0  # MiB an hour; 30 minutes see 10 MiB, two minutes only noise: see GROWTH
GROWTH = 24.0  # MiB between the first rest after the last kill and the last: less is noise
MORE_FDS = 8
MORE_TASKS = 8


def share(values: Sequence[float], part: float) -> float | None:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))] if ordered else None


def unexpected(soak: Soak) -> list[Visited]:
    """Ends that nothing excuses; of a killed engine the clients may be told in one clear way."""
    return [
        visit
        for visit in soak.visits
        if not (visit.is_expected or (visit.was_broken and visit.ending in WHEN_BROKEN))
    ]


def after_the_last_kill(soak: Soak) -> list[Rest]:
    """But for the leg in which the engine was young: kernels and grammars were met first."""
    last = max(soak.kills, default=0.0)
    return [rest for rest in soak.rests if rest.at > last][1:]


def slope(rests: list[Rest], of: str) -> float:
    """MiB an hour, by least squares, of memory at rest."""
    times = [rest.at / 3600 for rest in rests]
    return statistics.linear_regression(times, [getattr(rest.sample, of) for rest in rests]).slope


def growth(rests: list[Rest], of: str) -> float:
    return float(getattr(rests[-1].sample, of) - getattr(rests[0].sample, of))


def windows(soak: Soak) -> list[dict[str, Any]]:
    """Times of streamed answers that were whole, as they went by."""
    width, rows = soak.rests[-1].at / NUM_WINDOWS, []
    for number in range(NUM_WINDOWS):
        seen = [
            visit
            for visit in soak.visits
            if number * width <= visit.at < (number + 1) * width
            and visit.kind in ("stream", "prefix")
            and visit.ending == "done"
        ]
        row: dict[str, Any] = {"until": (number + 1) * width, "answers": len(seen)}
        for name, values in (
            ("first", [visit.first or 0.0 for visit in seen]),
            ("whole", [visit.seconds for visit in seen]),
        ):
            for part in (0.5, 0.95, 0.99):
                row[f"{name}_p{100 * part:.0f}"] = share(values, part)
        rows.append(row)
    return rows


def summary(soak: Soak) -> dict[str, Any]:
    rests = after_the_last_kill(soak)
    return {
        "seconds": soak.seconds,
        "requests": len(soak.visits),
        "endings": dict(Counter(visit.ending for visit in soak.visits).most_common()),
        "kinds": dict(Counter(visit.kind for visit in soak.visits).most_common()),
        "engine_kills": [round(at, 1) for at in soak.kills],
        "seconds_until_back": [round(seconds, 1) for seconds in soak.back],
        "told_of_a_dead_engine": sum(
            visit.was_broken and not visit.is_expected for visit in soak.visits
        ),
        "unexpected": [vars(visit) for visit in unexpected(soak)][:20],
        "rests_with_something_left": [rest.unsettled for rest in soak.rests if rest.unsettled],
        "rests_with_books_that_differ": [r.books_differ for r in soak.rests if r.books_differ],
        "livez_p99": share([sample.livez for sample in soak.samples], 0.99),
        "http_rss": [round(rest.sample.http_rss, 1) for rest in soak.rests],
        "engine_rss": [round(rest.sample.engine_rss, 1) for rest in soak.rests],
        "tasks": [rest.num_tasks for rest in soak.rests],
        "fds": [rest.sample.num_fds for rest in soak.rests],
        "http_slope_mib_per_hour": round(slope(rests, "http_rss"), 2),
        "engine_slope_mib_per_hour": round(slope(rests, "engine_rss"), 2),
        "http_growth_mib": round(growth(rests, "http_rss"), 2),
        "engine_growth_mib": round(growth(rests, "engine_rss"), 2),
        "windows": windows(soak),
        "exit_code": soak.exit_code,
        "books": {
            name: value
            for name, value in soak.books.items()
            if name.startswith(("pronk:requests", "pronk:engine_restarts", "vllm:prefix"))
            or name in ("vllm:generation_tokens_total", "pronk:discarded_tokens_total")
        },
    }


def faults(soak: Soak) -> list[str]:
    """What a server that is trusted at night does not do; nothing where all is well."""
    told = summary(soak)
    found: list[str] = []
    if told["unexpected"]:
        found.append(f"ends that nothing excuses: {told['unexpected'][:3]}")
    if told["rests_with_something_left"]:
        found.append(f"left behind: {told['rests_with_something_left']}")
    if told["rests_with_books_that_differ"]:
        found.append(f"books that differ: {told['rests_with_books_that_differ']}")
    for name in ("http", "engine"):
        more, hourly = told[f"{name}_growth_mib"], told[f"{name}_slope_mib_per_hour"]
        if more > GROWTH and hourly > SLOPE:
            found.append(f"the {name} process grew by {more} MiB, {hourly} an hour")
    if told["fds"][-1] > told["fds"][0] + MORE_FDS:
        found.append(f"file descriptors: {told['fds']}")
    if told["tasks"][-1] > told["tasks"][0] + MORE_TASKS:
        found.append(f"tasks: {told['tasks']}")
    if len(soak.kills) != len(soak.back):
        found.append("a killed engine did not come back")
    if soak.exit_code != 0:
        found.append(f"the server ended with {soak.exit_code}")
    return found


# ---- the page


def page(soak: Soak, told: dict[str, Any], picture: str, remark: str) -> str:
    lines = [
        f"# A soak of {soak.seconds / 60:g} minutes",
        "",
        f"`python -m tests.soak --seconds {soak.seconds:g}`. {remark}".rstrip(),
        "",
        "Mixed traffic (streams, whole answers, several choices, beams, schemas, shared prefixes,",
        "deadlines, embeddings, bad requests, clients that leave, read slowly or send half a body,",
        "bursts of 60) against a server of 8 slots, 16 places in the queue and 96 pages, whose",
        "engine is killed three times (SIGKILL). After each tenth everybody pauses, and what is",
        "left is looked at.",
        "",
        f"![memory and times]({picture})",
        "",
        "| | |",
        "|---|---|",
    ]
    rows: list[tuple[str, object]] = [
        ("requests", told["requests"]),
        ("how they ended", _counts(told["endings"])),
        ("ends that nothing excuses", len(told["unexpected"])),
        ("engine killed at, s", _list(told["engine_kills"])),
        ("back after, s", _list(told["seconds_until_back"])),
        ("told of the dead engine, once each", told["told_of_a_dead_engine"]),
        (
            "rests with a request or a block left",
            f"{len(told['rests_with_something_left'])} of {len(soak.rests)}",
        ),
        (
            "rests with books that differ",
            f"{len(told['rests_with_books_that_differ'])} of {len(soak.rests)}",
        ),
        ("/livez p99, ms", round(1000 * (told["livez_p99"] or 0), 1)),
        ("HTTP process at rest, MiB", _list(told["http_rss"])),
        ("slope since the last kill, MiB an hour", told["http_slope_mib_per_hour"]),
        ("engine at rest, MiB", _list(told["engine_rss"])),
        ("slope since the last kill, MiB an hour", told["engine_slope_mib_per_hour"]),
        ("file descriptors at rest", _list(told["fds"])),
        ("tasks of the event loop at rest", _list(told["tasks"])),
        ("exit code after SIGTERM", told["exit_code"]),
    ]
    lines += [f"| {name} | {value} |" for name, value in rows]
    lines += ["", "Streamed answers that were whole, over time (milliseconds):", ""]
    lines += ["| until, s | answers | first token p50 / p95 / p99 | whole p50 / p95 / p99 |"]
    lines += ["|---|---|---|---|"]
    for row in told["windows"]:
        first, whole = (
            " / ".join(_ms(row[f"{name}_p{part}"]) for part in (50, 95, 99))
            for name in ("first", "whole")
        )
        lines.append(f"| {row['until']:.0f} | {row['answers']} | {first} | {whole} |")
    return "\n".join(lines) + "\n"


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def _list(values: list[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:.0f}"


def write(soak: Soak, folder: Path, remark: str) -> None:
    """soak.md, soak.json and images/soak.svg below ``folder``."""
    told = summary(soak)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / "soak.json").write_text(json.dumps(told, indent=1) + "\n")
    (folder / "soak.md").write_text(page(soak, told, "images/soak.svg", remark))
    draw(soak, told, folder / "images" / "soak.svg")


def draw(soak: Soak, told: dict[str, Any], path: Path) -> None:
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    memory, times = figure.subplots(1, 2)
    minutes = [sample.at / 60 for sample in soak.samples]
    for name, color in (("engine_rss", "#1b6ca8"), ("http_rss", "#e08a1e")):
        values = [getattr(sample, name) for sample in soak.samples]
        label = name.replace("_rss", " process").replace("http", "HTTP")
        memory.plot(minutes, values, color=color, label=label)
    memory.set(xlabel="minutes", ylabel="MiB resident", ylim=(0, None))
    ends = [row["until"] / 60 for row in told["windows"]]
    for part, color in ((50, "#1b6ca8"), (95, "#e08a1e"), (99, "#b3261e")):
        values = [1000 * (row[f"whole_p{part}"] or 0) for row in told["windows"]]
        times.plot(ends, values, "-o", color=color, label=f"p{part}")
    times.set(xlabel="minutes", ylabel="streamed answers, ms", ylim=(0, None))
    for axes in (memory, times):
        for number, kill in enumerate(soak.kills):
            label = "engine killed" if not number else None
            axes.axvline(kill / 60, color="#888888", linestyle=":", label=label)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": path.stem}):  # small, and the same
        figure.savefig(path, metadata={"Date": None})
