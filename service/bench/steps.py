"""The engine's loop with a clock: schedule, launch, collect, update, and the network within."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from service.bench.problem import BenchProblem
from service.bench.workload import Job
from service.engine.messages import SamplingSettings, Submit
from service.engine.step import Step

if TYPE_CHECKING:
    from service.engine.runner import ModelRunner
    from service.engine.scheduler import Deliveries, Scheduler


@dataclass(frozen=True)
class TimedStep:
    """Seconds of each part of one step, and what it held."""

    schedule: float
    launch: float
    network: float  # within launch
    collect: float
    update: float
    num_drawn: int
    num_tokens: int
    num_rows: int
    context: int  # tokens whose keys and values were read
    is_decode: bool  # no token of a prompt among them

    @property
    def seconds(self) -> float:
        return self.schedule + self.launch + self.collect + self.update


def run(
    scheduler: Scheduler, runner: ModelRunner, jobs: list[Job], concurrency: int, temperature: float
) -> Iterator[TimedStep]:
    """Answer all jobs, ``concurrency`` at a time, as the engine's loop would."""
    waiting = iter(enumerate(jobs))
    num_running = 0
    with network_clock(runner) as network:
        while True:
            while num_running < concurrency and (pair := next(waiting, None)):
                scheduler.add(_submit(*pair, temperature))
                num_running += 1
            times = [time.perf_counter()]
            step = scheduler.schedule()
            if step is None:
                return
            shape = _shape_of(step)
            times.append(time.perf_counter())
            launched = runner.launch(step)
            times.append(time.perf_counter())
            result = runner.collect(launched)
            times.append(time.perf_counter())
            deliveries = scheduler.update(step, result)
            times.append(time.perf_counter())
            num_ended, num_drawn = _count(deliveries)
            num_running -= num_ended
            schedule, launch, collect, update = (
                after - before for before, after in itertools.pairwise(times)
            )
            yield TimedStep(schedule, launch, network(), collect, update, num_drawn, **shape)


def _submit(number: int, job: Job, temperature: float) -> Submit:
    assert isinstance(job.prompt, list), "the engine speaks token ids"
    own = SamplingSettings(max_tokens=job.output_len, temperature=temperature, seed=number)
    return Submit(number, job.prompt, [own])


def _shape_of(step: Step) -> dict[str, Any]:
    rows = step.rows
    return {
        "num_tokens": step.num_tokens,
        "num_rows": len(rows),
        "context": sum(row.end for row in rows),
        "is_decode": all(row.start >= row.sequence.num_prompt for row in rows),
    }


def _count(deliveries: Deliveries) -> tuple[int, int]:
    """(sequences that ended, tokens drawn). Raises ``BenchProblem`` for one that failed."""
    outputs = [output for own in deliveries.values() for output in own]
    for output in outputs:
        if output.error:
            raise BenchProblem(f"the engine failed: {output.error}")
    ended = sum(output.finish_reason is not None for output in outputs)
    return ended, sum(len(output.tokens) for output in outputs)


@contextmanager
def network_clock(runner: Any) -> Iterator[Callable[[], float]]:
    """Seconds the network took since last asked.

    On a GPU calls return before the work is done: events on its stream tell then.
    """
    device = runner.model.device
    clock = _EventClock() if device.type == "cuda" else _WallClock()
    graphs = getattr(runner, "_graphs", None)
    owners = [owner for owner in (runner.model, graphs) if owner is not None]
    originals = [owner.forward for owner in owners]
    for owner, forward in zip(owners, originals, strict=True):
        owner.forward = clock.around(forward)
    try:
        yield clock.take
    finally:
        for owner in owners:
            del owner.forward  # the class's own again


class _WallClock:
    def __init__(self) -> None:
        self._seconds = 0.0

    def around(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return forward(*args, **kwargs)
            finally:
                self._seconds += time.perf_counter() - began

        return timed

    def take(self) -> float:
        seconds, self._seconds = self._seconds, 0.0
        return seconds


class _EventClock:
    def __init__(self) -> None:
        self._pairs: list[tuple[Any, Any]] = []

    def around(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        import torch

        def timed(*args: Any, **kwargs: Any) -> Any:
            make: Any = torch.cuda.Event
            start, end = make(enable_timing=True), make(enable_timing=True)
            start.record()
            try:
                return forward(*args, **kwargs)
            finally:
                end.record()
                self._pairs.append((start, end))

        return timed

    def take(self) -> float:
        pairs, self._pairs = self._pairs, []
        for _, end in pairs:
            end.synchronize()
        return sum(float(start.elapsed_time(end)) for start, end in pairs) / 1e3
