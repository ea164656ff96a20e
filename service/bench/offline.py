"""``pronk bench``: the engine process's own runner and scheduler, run in this process.

No HTTP, no second process: what is left is the network and what pronk does between two calls of it.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import Struct
from rich.console import Console

from service.backend import ServeProblem, Source, core_plan, engine_options, find_model
from service.bench import report
from service.bench.problem import BenchProblem
from service.bench.rates import Rates, describe
from service.bench.steps import TimedStep, run
from service.bench.workload import Workload
from service.engine.options import EngineOptions
from service.engine.process import BRIEF_SPIN
from service.engine.worker import make_scheduler
from service.errors import PronkError
from service.settings import Settings

if TYPE_CHECKING:
    from service.engine.loading import Loaded


@dataclass(frozen=True)
class OfflineSettings:
    """``engine``: what ``pronk serve`` would start the engine with. ``shape`` replaces a model."""

    engine: Settings
    concurrency: list[int]
    workload: Workload
    shape: str | None = None
    num_prompts: int | None = None  # None: as many as run at a time
    temperature: float = 0.0
    json: Path | None = None

    def __post_init__(self) -> None:
        if self.shape is not None and self.engine.model is not None:
            raise BenchProblem("give a model or --shape, not both")
        if any(count < 1 for count in self.concurrency) or not self.concurrency:
            raise BenchProblem("--concurrency counts sequences: at least 1")


class Parts(Struct, frozen=True):
    """Shares of a decode step's time. All but ``network`` is between two calls of the network.

    ``prepare`` builds the batch and starts the sampling (a processor then does it), ``collect``
    waits for what was drawn.
    """

    schedule: float
    prepare: float
    network: float
    collect: float
    update: float

    @property
    def between_calls(self) -> float:
        return 1.0 - self.network


class OfflineResult(Struct, frozen=True):
    """One concurrency. Decode figures are of steps at full width that hold no prompt token."""

    concurrency: int
    num_prompts: int
    seconds: float
    prompt_tokens: int
    output_tokens: int
    output_tokens_per_second: float  # of the whole run, prompts included
    prefill_tokens_per_second: float | None  # tokens of the steps that hold prompt chunks
    decode_tokens_per_second: float | None
    decode_step: float | None  # seconds, median
    decode_parts: Parts | None
    decode_limit: float | None  # seconds to read weights and cached keys once
    limit_share: float | None  # of that limit the median step reaches


class OfflineReport(Struct, frozen=True):
    command: str
    date: str
    machine: str
    model: str
    facts: dict[str, str]
    weight_bytes: int
    rates: Rates
    settings: dict[str, Any]
    results: list[OfflineResult]
    format: int = report.FORMAT


def measure(settings: OfflineSettings) -> OfflineReport:
    """Raises ``BenchProblem`` with one clear line."""
    if "OMP_WAIT_POLICY" not in os.environ:  # as the engine process is started
        os.environ.setdefault(*BRIEF_SPIN)
    try:
        with _model(settings) as source:
            return _measure(settings, source)
    except (PronkError, ServeProblem, ValueError, OSError) as error:
        raise BenchProblem(str(error).splitlines()[0]) from error


@contextmanager
def _model(settings: OfflineSettings) -> Iterator[Source]:
    if settings.shape is None:
        source = find_model(settings.engine.model)
        if source.path is None:
            raise BenchProblem(f"{source.reference} is a hub id: download it, give its folder")
        yield source
        return
    from model import random_checkpoint

    if settings.shape not in random_checkpoint.SHAPES:
        known = ", ".join(random_checkpoint.SHAPES)
        raise BenchProblem(f"no shape {settings.shape!r}; the shapes known are {known}")
    with tempfile.TemporaryDirectory(prefix="pronk-bench-") as scratch:
        folder = Path(scratch) / f"random-{settings.shape}"
        random_checkpoint.write(settings.shape, folder)
        yield Source(str(folder), folder)


def _measure(settings: OfflineSettings, source: Source) -> OfflineReport:
    from service.bench import rates

    console = Console(stderr=True, highlight=False)
    options = engine_options(settings.engine, source, core_plan(settings.engine, source))
    with console.status("loading"):
        loaded = load(options)
    widest = max(settings.concurrency)
    if widest > loaded.limits.max_num_seqs:
        raise BenchProblem(
            f"{widest} at a time are more than this engine runs: --max-num-seqs {widest}"
        )
    with console.status("measuring the machine"):
        limits = rates.measure(str(loaded.runner.model.device))
    results = []
    for number, concurrency in enumerate(settings.concurrency):
        with console.status(f"{concurrency} at a time"):
            results.append(_at(settings, options, loaded, limits, concurrency, number))
    found = OfflineReport(
        command=report.command_line(),
        date=report.now(),
        machine=report.machine(),
        model=source.name,
        facts=loaded.facts,
        weight_bytes=loaded.runner.model.weight_bytes,
        rates=limits,
        settings={
            "input_len": str(settings.workload.input_len),
            "output_len": str(settings.workload.output_len),
            "shared_prefix": settings.workload.shared_prefix,
            "temperature": settings.temperature,
            "seed": settings.workload.seed,
        },
        results=results,
    )
    if settings.json is not None:
        report.write_json(found, settings.json)
    return found


def load(options: EngineOptions) -> Loaded:
    from service.engine import loading

    loaded = loading.load(options, lambda share: None)
    return loading.settle(options, loaded, list(loading.warm_up(loaded)))


def _at(
    settings: OfflineSettings,
    options: EngineOptions,
    loaded: Loaded,
    limits: Rates,
    concurrency: int,
    number: int,
) -> OfflineResult:
    jobs = settings.workload.jobs(settings.num_prompts or concurrency, stream=number)
    scheduler = make_scheduler(options, loaded.limits, loaded.num_blocks)
    began = time.perf_counter()
    steps = list(run(scheduler, loaded.runner, jobs, concurrency, settings.temperature))
    seconds = time.perf_counter() - began
    prompt_tokens = sum(len(job.prompt) for job in jobs)
    return summarize(steps, loaded, limits, concurrency, (len(jobs), prompt_tokens), seconds)


def summarize(
    steps: list[TimedStep],
    loaded: Loaded,
    limits: Rates,
    concurrency: int,
    prompts: tuple[int, int],
    seconds: float,
) -> OfflineResult:
    """``prompts``: how many, and their tokens together."""
    chunks = [step for step in steps if not step.is_decode]
    decodes = _usual(_at_full_width([step for step in steps if step.is_decode]))
    output_tokens = sum(step.num_drawn for step in steps)
    step_time = median(step.seconds for step in decodes) if decodes else None
    limit = _decode_limit(decodes, loaded, limits)
    return OfflineResult(
        concurrency=concurrency,
        num_prompts=prompts[0],
        seconds=seconds,
        prompt_tokens=prompts[1],
        output_tokens=output_tokens,
        output_tokens_per_second=output_tokens / seconds,
        prefill_tokens_per_second=_rate(chunks, [step.num_tokens for step in chunks]),
        decode_tokens_per_second=_rate(decodes, [step.num_drawn for step in decodes]),
        decode_step=step_time,
        decode_parts=_parts(decodes),
        decode_limit=limit,
        limit_share=limit / step_time if limit and step_time else None,
    )


def _at_full_width(steps: list[TimedStep]) -> list[TimedStep]:
    widest = max((step.num_rows for step in steps), default=0)
    return [step for step in steps if step.num_rows == widest]


def _usual(steps: list[TimedStep]) -> list[TimedStep]:
    """Without those that something else on the machine made twice as long."""
    if not steps:
        return []
    bound = 2 * median(step.seconds for step in steps)
    return [step for step in steps if step.seconds <= bound]


def _rate(steps: list[TimedStep], tokens: list[int]) -> float | None:
    return sum(tokens) / sum(step.seconds for step in steps) if steps else None


def _decode_limit(decodes: list[TimedStep], loaded: Loaded, limits: Rates) -> float | None:
    """Seconds to read all weights once and every row's keys and values."""
    if not decodes:
        return None
    from model.kv_cache import bytes_per_block

    runner = loaded.runner
    token_bytes = bytes_per_block(runner.model.config, 1, runner.model.dtype)
    read = runner.model.weight_bytes + token_bytes * median(step.context for step in decodes)
    return float(read / limits.read_bytes_per_second)


def _parts(decodes: list[TimedStep]) -> Parts | None:
    if not decodes:
        return None
    total = sum(step.seconds for step in decodes)
    return Parts(
        schedule=sum(step.schedule for step in decodes) / total,
        prepare=sum(step.launch - step.network for step in decodes) / total,
        network=sum(step.network for step in decodes) / total,
        collect=sum(step.collect for step in decodes) / total,
        update=sum(step.update for step in decodes) / total,
    )


HEAD = (
    *("streams", "prefill tok/s", "decode tok/s", "ms a step", "of the limit", "out tok/s"),
    *("between", "schedule", "prepare", "network", "collect", "update"),
)


def show(found: OfflineReport) -> str:
    """The table, with what it is held against above it."""
    facts = found.facts
    lines = [
        f"{found.model}: {facts.get('dtype')} on {facts.get('device')}, "
        f"{facts.get('attention')}, {found.weight_bytes / 1e6:.3g} MB of weights",
        f"{found.machine}; {describe(found.rates)}",
        report.table([HEAD, *map(_row, found.results)]),
        "of the limit: time to read weights and cached keys once, over the median decode step; "
        "between: share of a step outside the network, its parts beside it",
    ]
    return "\n".join(lines)


def _row(result: OfflineResult) -> tuple[str, ...]:
    parts = result.decode_parts
    shares = [parts.between_calls, *msgspec.structs.astuple(parts)] if parts else [None] * 6
    return (
        str(result.concurrency),
        _number(result.prefill_tokens_per_second),
        _number(result.decode_tokens_per_second),
        report.milliseconds(result.decode_step),
        _percent(result.limit_share),
        _number(result.output_tokens_per_second),
        *map(_percent, shares),
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"
