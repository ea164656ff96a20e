"""Ways to give an account its place: ``python -m tests.benchmarks.fairness_variants``.

The scheduler with a device of integers, whose steps take what the bundled model's took: a flood of
long requests holds every slot, and short ones of another account come at random. Prints the short
ones' time to first token and what is lost, where places are given up (as the server does it),
where who waits has the next slot that comes free, and where slots are kept free of each account.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table

from service.engine.blocks import BlockPool
from service.engine.lineup import Lineup
from service.engine.messages import SamplingSettings, Submit
from service.engine.scheduler import Policy, Scheduler
from service.engine.sequence import Sequence
from service.engine.step import Draw, RowResult, Step, StepResult

SLOTS, BUDGET = 64, 512
BASE, PROMPT, DECODE = 1.0e-3, 0.06e-3, 0.14e-3  # seconds a step, a prompt token, a decoding row


def as_it_is(lineup: Lineup) -> None:
    """Nothing is changed."""


def never_yield(lineup: Lineup) -> None:
    lineup.leaving = list  # type: ignore[method-assign]


def reserve(kept: int) -> Callable[[Lineup], None]:
    """No account runs in the last slots, unless it runs in no other."""

    def change(lineup: Lineup) -> None:
        admit = lineup._admit

        def admit_below(sequence: Sequence, step: Step) -> bool:
            own = sum(other.account is sequence.account for other in lineup.running)
            return own < lineup.max_num_seqs - kept and admit(sequence, step)

        never_yield(lineup)
        lineup._admit = admit_below  # type: ignore[method-assign]

    return change


VARIANTS: dict[str, tuple[Policy, Callable[[Lineup], None]]] = {
    "first come, first served": ("fcfs", as_it_is),
    "next free slot": ("fair", never_yield),
    "4 slots kept": ("fair", reserve(4)),
    "16 slots kept": ("fair", reserve(16)),
    "places given up": ("fair", as_it_is),
}


@dataclass
class Run:
    """``interval``: seconds between bursts of ``burst`` short requests, on average."""

    scheduler: Scheduler
    interval: float
    burst: int
    pages: int
    dice: random.Random = field(default_factory=lambda: random.Random(1))
    now: float = 0.0
    num_tokens: int = 0
    num_computed: int = 0
    arrivals: dict[int, float] = field(default_factory=dict)
    times: list[float] = field(default_factory=list)

    def submit(self, account: str, prompt: int, answer: int) -> None:
        number = len(self.arrivals)
        self.arrivals[number] = self.now
        tokens = [number % 30_000 + 3] * prompt
        settings = [SamplingSettings(max_tokens=answer)]
        self.scheduler.add(Submit(number, tokens, settings, account=account))

    def run(self, seconds: float) -> None:
        due = self.interval
        while self.now < seconds:
            while len(self.scheduler._waiting) < 200:
                self.submit("flood", self.dice.randint(100, 400), self.dice.randint(100, 500))
            if self.now >= due:
                due += self.dice.expovariate(1 / self.interval)
                for _ in range(self.burst):
                    self.submit("victim", 24, 8)
            self.step()

    def step(self) -> None:
        step = self.scheduler.schedule()
        assert step is not None
        decodes = sum(row.count == 1 for row in step.rows)
        self.now += BASE + decodes * DECODE + (step.num_tokens - decodes) * PROMPT
        self.num_computed += step.num_tokens
        owners = {row.sequence.id: row.sequence.account.name for row in step.rows}
        result = StepResult([RowResult([Draw(7)] * len(row.choices)) for row in step.rows])
        for output in self.scheduler.update(step, result).get(0, []):
            self.num_tokens += len(output.tokens)
            if output.queue_time is not None and owners[output.id] == "victim":
                self.times.append(self.now - self.arrivals[output.id])


def measure(variant: str, seconds: float, interval: float, burst: int, pages: int) -> Run:
    policy, change = VARIANTS[variant]
    scheduler = Scheduler(
        BlockPool(pages, 256),
        max_num_seqs=SLOTS,
        max_num_batched_tokens=BUDGET,
        max_model_len=4096,
        policy=policy,
    )
    change(scheduler._lineup)
    run = Run(scheduler, interval, burst, pages)
    run.run(seconds)
    return run


def report(seconds: float, interval: float, burst: int, pages: int) -> None:
    title = f"{burst} short at once, every {interval:g} s; {pages} pages"
    table = Table("", "p50 TTFT", "p95", "tok/s", "computed twice", "preempted", title=title)
    for variant in VARIANTS:
        run = measure(variant, seconds, interval, burst, pages)
        times = sorted(run.times) or [float("inf")]
        counters = run.scheduler.counters
        useful = counters.prompt_tokens + counters.generation_tokens - counters.prefix_hits
        table.add_row(
            variant,
            f"{1e3 * times[len(times) // 2]:,.0f} ms",
            f"{1e3 * times[int(0.95 * len(times))]:,.0f} ms",
            f"{run.num_tokens / run.now:,.0f}",
            f"{max(0.0, run.num_computed / useful - 1):.2%}",
            f"{counters.preemptions}",
        )
    Console().print(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seconds", type=float, default=60.0, help="on the device's clock")
    options = parser.parse_args()
    for burst, interval, pages in ((1, 0.5, 400), (16, 4.0, 400), (1, 0.5, 100)):
        report(options.seconds, interval, burst, pages)
