"""Requests sent at a fixed concurrency, or as they arrive at a rate."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from service.bench.client import PATHS, Target, Trace, stream
from service.bench.workload import Job, poisson_arrivals

Observer = Callable[[Trace], object]


def _unseen(trace: Trace) -> None:
    """Nobody looks at a request before all are done."""


@dataclass(frozen=True)
class Level:
    """``value`` requests in flight all the time, or arriving a second."""

    kind: str  # concurrency, rate
    value: float

    def __str__(self) -> str:
        return f"{self.value:g} {'at a time' if self.kind == 'concurrency' else 'a second'}"


@dataclass(frozen=True)
class Asking:
    """What every request's body says beside its prompt. ``model`` "" leaves the name out."""

    endpoint: str = "completions"  # completions, chat
    model: str = ""
    ignore_eos: bool = True
    include_usage: bool = True
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> str:
        return PATHS[self.endpoint]

    def body(self, job: Job) -> dict[str, Any]:
        body: dict[str, Any] = {"max_tokens": job.output_len, "temperature": 0, "stream": True}
        if self.endpoint == "chat":
            body["messages"] = [{"role": "user", "content": job.prompt}]
        else:
            body["prompt"] = job.prompt
        if self.include_usage:
            body["stream_options"] = {"include_usage": True}
        if self.ignore_eos:
            body["ignore_eos"] = True
        if self.model:
            body["model"] = self.model
        return body | self.extra


async def run(
    target: Target,
    asking: Asking,
    level: Level,
    jobs: list[Job],
    seed: int = 0,
    observe: Observer = _unseen,
) -> tuple[list[Trace], float]:
    """(traces, seconds from the first request to the last answer)."""
    start = time.monotonic()
    if level.kind == "concurrency":
        traces = await _at_concurrency(target, asking, int(level.value), jobs, observe)
    else:
        arrivals = poisson_arrivals(level.value, len(jobs), seed)
        due = [start + seconds for seconds in arrivals]
        traces = await _as_they_arrive(target, asking, zip(due, jobs, strict=True), observe)
    return traces, max(trace.end for trace in traces) - min(trace.start for trace in traces)


async def _at_concurrency(
    target: Target, asking: Asking, concurrency: int, jobs: list[Job], observe: Observer
) -> list[Trace]:
    """The next request is sent when one is answered, well or badly."""
    waiting = iter(jobs)
    traces: list[Trace] = []

    async def client() -> None:
        for job in waiting:
            trace = await stream(target, asking.path, asking.body(job))
            traces.append(trace)
            observe(trace)

    await asyncio.gather(*(client() for _ in range(min(concurrency, len(jobs)))))
    return traces


async def _as_they_arrive(
    target: Target, asking: Asking, due: Iterable[tuple[float, Job]], observe: Observer
) -> list[Trace]:
    """Each at its time, however many are unanswered; waiting counts from when it was due."""

    async def send(at: float, job: Job) -> Trace:
        await asyncio.sleep(max(0.0, at - time.monotonic()))
        trace = await stream(target, asking.path, asking.body(job), start=at)
        observe(trace)
        return trace

    return list(await asyncio.gather(*(send(at, job) for at, job in due)))
