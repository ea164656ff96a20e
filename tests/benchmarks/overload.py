"""Load shedding: ``python -m tests.benchmarks.overload [--plot FILE.svg]``. About two minutes.

A real server with a small queue, and requests that arrive (Poisson) at a quarter to twenty times
the rate it sustains, whether or not those before are answered. The engine has one thread, the HTTP
process and this generator the other core. What is printed: tokens a second of requests
that were answered whole, times of those let in (from when they were due), of refusals and of
/livez, memory. Then a burst of five times what it takes at once, all of whom come again when they
are told to.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvloop
from rich.console import Console
from rich.table import Table

from service.bench.plot import check as check_plot
from tests.running import serving
from tests.traffic.arrivals import arrive
from tests.traffic.client import Answer, Client
from tests.traffic.processes import Watch, watching

LEVELS = (0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0)
SLOTS, QUEUE = 16, 16
PROMPT, OUTPUT = 64, 64
WARM = 3.0  # seconds of a level that are not counted: the queue fills
VOCABULARY = (300, 1000)
BURST = 5


@dataclass
class Level:
    factor: float
    rate: float  # requests a second, offered
    seconds: float
    answers: list[Answer] = field(default_factory=list)  # due in the counted time
    tokens: int = 0  # of those that were done in it
    livez: list[float] = field(default_factory=list)
    rss: tuple[float, float] = (0.0, 0.0)  # MiB at its end: HTTP process, engine

    @property
    def goodput(self) -> float:
        return self.tokens / self.seconds

    def of(self, ending: str) -> list[Answer]:
        return [answer for answer in self.answers if answer.ending == ending]

    @property
    def num_failed(self) -> int:
        return len(self.answers) - len(self.of("done")) - len(self.of("refused"))


def share(values: list[float], part: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))] if ordered else float("nan")


def a_body(draw: random.Random) -> dict[str, Any]:
    """Of its own prompt, so that no cached prefix helps."""
    return {
        "prompt": [draw.randrange(*VOCABULARY) for _ in range(PROMPT)],
        "max_tokens": OUTPUT,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def sustainable(client: Client, seconds: float) -> float:
    """Requests a second with every slot taken and as many more waiting."""
    draw, ends = random.Random(1), list[float]()
    stop = time.monotonic() + seconds

    async def one() -> None:
        while time.monotonic() < stop:
            answer = await client.post("/v1/completions", a_body(draw))
            assert answer.is_done, answer
            ends.append(time.monotonic())

    await asyncio.gather(*(one() for _ in range(SLOTS + QUEUE // 2)))
    counted = [end for end in ends if stop - seconds / 2 <= end <= stop]
    return len(counted) / (seconds / 2)


async def run_level(
    client: Client, watch: Watch, factor: float, rate: float, seconds: float
) -> Level:
    level, draw = Level(factor, rate, seconds), random.Random(factor)
    start = time.monotonic() + WARM
    first_sample = len(watch.samples)

    async def send(due: float) -> None:
        answer = await client.post("/v1/completions", a_body(draw), due)
        if answer.due >= start:
            level.answers.append(answer)
        if answer.is_done and start <= answer.due + answer.seconds <= start + seconds:
            level.tokens += answer.tokens

    await arrive(rate, WARM + seconds, send, seed=int(100 * factor))
    level.livez = [one.livez for one in watch.samples[first_sample:]]
    level.rss = watch.samples[-1].http_rss, watch.samples[-1].engine_rss
    await asyncio.sleep(0.5)
    return level


@dataclass
class Returned:
    """A client of the burst: how often it was refused, what it was told, when it was let in."""

    told: list[int] = field(default_factory=list)
    seconds: float = 0.0


async def burst(client: Client, count: int) -> list[Returned]:
    draw = random.Random(2)

    async def one(body: dict[str, Any]) -> Returned:
        found, start = Returned(), time.monotonic()
        while True:
            sent = time.monotonic()
            answer = await client.post("/v1/completions", body)
            if answer.ending != "refused":
                assert answer.is_done, answer
                found.seconds = sent - start
                return found
            assert answer.retry_after is not None
            found.told.append(answer.retry_after)
            await asyncio.sleep(answer.retry_after)

    return await asyncio.gather(*(one(a_body(draw)) for _ in range(count)))


async def measure(url: str, pid: int, seconds: float) -> tuple[list[Level], list[Returned]]:
    client, levels = Client(url), list[Level]()
    rate = await sustainable(client, 8.0)
    async with watching(url, pid, 0.25) as watch:
        await asyncio.sleep(0.5)
        for factor in LEVELS:
            levels.append(await run_level(client, watch, factor, factor * rate, seconds))
    returned = await burst(client, BURST * (SLOTS + QUEUE))
    await client.close()
    return levels, returned


# ---- what is shown


def milliseconds(values: list[float], part: float) -> str:
    return f"{1000 * share(values, part):.0f}" if values else "-"


def table(levels: list[Level]) -> Table:
    shown = Table(title="Load shedding", title_justify="left")
    for name in ("load", "offered/s", "done", "refused", "failed", "tok/s", "TTFT p50/p95 ms"):
        shown.add_column(name, justify="right")
    for name in (
        "total p50/p95 ms",
        "refusal p50/p99 ms",
        "Retry-After s",
        "livez p99 ms",
        "RSS MiB",
    ):
        shown.add_column(name, justify="right")
    for level in levels:
        done, refused = level.of("done"), level.of("refused")
        first = [answer.first or 0.0 for answer in done]
        whole = [answer.seconds for answer in done]
        no = [answer.seconds for answer in refused]
        told = [answer.retry_after or 0 for answer in refused]
        shown.add_row(
            f"{level.factor:g}x",
            f"{level.rate:.1f}",
            str(len(done)),
            str(len(refused)),
            str(level.num_failed),
            f"{level.goodput:.0f}",
            f"{milliseconds(first, 0.5)} / {milliseconds(first, 0.95)}",
            f"{milliseconds(whole, 0.5)} / {milliseconds(whole, 0.95)}",
            f"{1000 * share(no, 0.5):.1f} / {1000 * share(no, 0.99):.1f}" if no else "-",
            f"{min(told)} to {max(told)}" if told else "-",
            f"{1000 * share(level.livez, 0.99):.0f}",
            f"{level.rss[0]:.0f} + {level.rss[1]:.0f}",
        )
    return shown


def say_burst(returned: list[Returned], console: Console) -> None:
    tries = Counter(len(one.told) for one in returned)
    late = [one.seconds - sum(one.told) for one in returned if one.told]
    console.print(
        f"A burst of {len(returned)}: {tries[0]} let in at once; by the number of times they were "
        f"refused first: {dict(sorted(tries.items()))}. The last was let in after "
        f"{max(one.seconds for one in returned):.1f} s. From the time they were told to the time "
        f"they were in: at most {max(late, default=0):.2f} s more."
    )


def draw_curve(levels: list[Level], path: Path) -> None:
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    good, times = figure.subplots(1, 2)
    loads = [level.factor for level in levels]
    offered = [level.rate * OUTPUT for level in levels]
    good.plot(loads, offered, ":", color="#888888", label="offered")
    good.plot(
        loads, [level.goodput for level in levels], "-o", color="#1b6ca8", label="answered whole"
    )
    highest = max(level.goodput for level in levels)
    good.axhspan(
        0.9 * highest, highest, color="#1b6ca8", alpha=0.12, label="within 10 % of the peak"
    )
    good.set(ylabel="output tokens a second", ylim=(0, 1.4 * highest))
    for part, style in ((0.5, "-"), (0.95, "--")):
        done = [[1e3 * one.seconds for one in level.of("done")] for level in levels]
        first = [[1e3 * (one.first or 0.0) for one in level.of("done")] for level in levels]
        for values, mark, color, name in (
            (done, "o", "#1b6ca8", "whole answer"),
            (first, "s", "#e08a1e", "first token"),
        ):
            label = f"{name}, p{100 * part:.0f}"
            marks = style + mark
            times.plot(loads, [share(one, part) for one in values], marks, color=color, label=label)
    shed = [level for level in levels if level.of("refused")]
    refusals = [share([1e3 * one.seconds for one in level.of("refused")], 0.99) for level in shed]
    times.plot(
        [level.factor for level in shed], refusals, "-^", color="#b3261e", label="refusal, p99"
    )
    times.set(ylabel="ms", yscale="log")
    times.set_yticks([5, 10, 30, 100, 300, 1000], ["5", "10", "30", "100", "300", "1,000"])
    good.set_title("Tokens a second of requests answered whole", fontsize=10)
    times.set_title("Times of those let in, and of refusals", fontsize=10)
    for axes in (good, times):
        axes.set(xscale="log", xlabel="load offered, in times of what is sustainable")
        axes.set_xticks(loads, [f"{load:g}" for load in loads])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small", loc="lower right")
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": path.stem}):  # small, and the same
        figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=8.0, help="counted, of each level")
    parser.add_argument("--plot", type=Path, help="where the curve is drawn: a .svg or .png")
    options = parser.parse_args()
    if options.plot is not None:
        check_plot(options.plot)
    limits = ("--max-num-seqs", str(SLOTS), "--max-queued-requests", str(QUEUE))
    with serving("--no-sample", "--threads", "1", *limits) as server:
        levels, returned = uvloop.run(measure(server.url, server.process.pid, options.seconds))
    console = Console(width=180)
    console.print(table(levels))
    best = max(level.goodput for level in levels)
    console.print(
        f"At {levels[-1].factor:g} times the load: {levels[-1].goodput / best:.0%} of the peak."
    )
    say_burst(returned, console)
    if options.plot is not None:
        draw_curve(levels, options.plot)


if __name__ == "__main__":
    main()
