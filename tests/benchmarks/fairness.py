"""A victim beside a flood: ``python -m tests.benchmarks.fairness``.

A real server (the bundled model) with two keys. One key sends 1,000 long requests at once; the
other a short one every quarter second, until the flood is answered. Prints the victim's times to
first token (alone, under --scheduling-policy fair, under fcfs), and the tokens a second of all.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from service.bench.client import Target, Trace, fetch, stream
from tests.running import serving

PATH = "/v1/completions"
INTERVAL = 0.25  # seconds between two requests of the victim
COLORS = {"alone": "#6b7280", "fair": "#1b6ca8", "fcfs": "#b3261e"}
LABELS = {
    "alone": "alone",
    "fair": "beside the flood, fair shares",
    "fcfs": "beside the flood, first come, first served",
}
TICKS = {0.01: "10 ms", 0.1: "0.1 s", 1.0: "1 s", 10.0: "10 s", 100.0: "100 s"}


@dataclass(frozen=True)
class Load:
    flood: int
    prompt: int
    answer: int
    num_alone: int


@dataclass
class Found:
    """``times``: seconds to first token of the victim's requests, in their order."""

    name: str
    times: list[float]
    seconds: float  # to the end of all
    tokens: int  # generated, both keys together
    failures: int

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds

    def quantile(self, share: float) -> float:
        ordered = sorted(self.times)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def body(number: int, prompt: int, answer: int, **fields: object) -> dict[str, Any]:
    """Prompts that share no prefix."""
    ids = [300 + (number * 7919 + place * 31) % 500 for place in range(prompt)]
    return {"prompt": ids, "max_tokens": answer, "ignore_eos": True, "temperature": 0, **fields}


async def flood(url: str, load: Load) -> int:
    """Tokens that its whole answers have."""
    target = Target(url, api_key="flood", timeout=600)

    async def ask(number: int) -> int:
        status, _, answer = await fetch(target, PATH, body(number, load.prompt, load.answer))
        return int(json.loads(answer)["usage"]["completion_tokens"]) if status == 200 else 0

    return sum(await asyncio.gather(*[ask(number) for number in range(load.flood)]))


async def victim(url: str, until: asyncio.Task[int] | None, most: int) -> list[Trace]:
    """A request every ``INTERVAL`` while the flood lasts, whether those before are answered."""
    target = Target(url, api_key="victim", timeout=600)
    asked: list[asyncio.Task[Trace]] = []
    for number in count(100_000):
        if until.done() if until is not None else len(asked) >= most:
            break
        own = body(number, 24, 8, stream=True, stream_options={"include_usage": True})
        asked.append(asyncio.create_task(stream(target, PATH, own)))
        await asyncio.sleep(INTERVAL)
    return list(await asyncio.gather(*asked))


async def both(url: str, name: str, load: Load) -> Found:
    began = time.monotonic()
    task = None if name == "alone" else asyncio.create_task(flood(url, load))
    if task is not None:
        await asyncio.sleep(4 * INTERVAL)  # all slots are taken
    traces = await victim(url, task, load.num_alone)
    flooded = 0 if task is None else await task
    good = [trace for trace in traces if trace.is_good]
    return Found(
        name,
        [trace.first_token for trace in good],
        time.monotonic() - began,
        flooded + sum(trace.tokens for trace in good),
        len(traces) - len(good),
    )


def measure(name: str, load: Load, extra: list[str]) -> Found:
    policy = "fcfs" if name == "fcfs" else "fair"
    flags = ["--api-key", "flood", "--api-key", "victim", "--scheduling-policy", policy]
    with serving("--no-sample", *flags, *extra) as server:
        asyncio.run(victim(server.url, None, 2))  # warm
        return asyncio.run(both(server.url, name, load))


def report(found: list[Found], load: Load) -> None:
    rates = {one.name: one.rate for one in found}
    title = f"{load.flood} requests of {load.prompt} + {load.answer} tokens beside short ones"
    table = Table("", "requests", "p50 TTFT", "p95", "worst", "tok/s", "of fcfs", title=title)
    for one in found:
        share = f"{one.rate / rates['fcfs']:.1%}" if "fcfs" in rates else ""
        table.add_row(
            one.name + (f" ({one.failures} failed)" if one.failures else ""),
            str(len(one.times)),
            f"{1e3 * statistics.median(one.times):,.0f} ms",
            f"{1e3 * one.quantile(0.95):,.0f} ms",
            f"{1e3 * max(one.times):,.0f} ms",
            "" if one.name == "alone" else f"{one.rate:,.0f}",
            "" if one.name == "alone" else share,
        )
    Console().print(table)


def draw(found: list[Found], load: Load, path: Path) -> None:
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    for one in found:
        ordered = sorted(one.times)
        shares = [100 * (place + 1) / len(ordered) for place in range(len(ordered))]
        color, p95 = COLORS[one.name], one.quantile(0.95)
        axes.step(ordered, shares, where="post", color=color, label=LABELS[one.name])
        axes.plot([p95], [95], "o", color=color)
        told = f"{1e3 * p95:.0f} ms" if p95 < 1 else f"{p95:.0f} s"
        axes.annotate(told, (p95, 95), (8, -12), textcoords="offset points")
    axes.axhline(95, color="#9ca3af", linewidth=0.8, linestyle=":")
    axes.set(xlabel="time to first token", ylabel="share of the short requests, %", xscale="log")
    axes.set_xticks([*TICKS], [*TICKS.values()])
    axes.margins(x=0.07)
    axes.minorticks_off()
    axes.set_title(
        f"One key's short requests beside {load.flood:,} of another "
        f"({load.prompt} + {load.answer} tokens)",
        fontsize=10,
    )
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, fontsize="small", frameon=False)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": path.stem}):  # small, and the same
        figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--flood", type=int, default=1000, help="requests of the other key")
    parser.add_argument("--prompt", type=int, default=160, help="tokens of each")
    parser.add_argument("--answer", type=int, default=100, help="tokens each is to say")
    parser.add_argument("--alone", type=int, default=20, help="requests of the victim alone")
    parser.add_argument("--plot", type=Path, help="an SVG file to write")
    parser.add_argument("--serve", nargs=argparse.REMAINDER, default=[], help="flags of the server")
    options = parser.parse_args()
    load = Load(options.flood, options.prompt, options.answer, options.alone)
    found = [measure(name, load, options.serve) for name in COLORS]
    report(found, load)
    if options.plot is not None:
        draw(found, load, options.plot)


if __name__ == "__main__":
    main()
