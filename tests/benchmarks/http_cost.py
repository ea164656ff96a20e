"""What HTTP costs: ``python -m tests.benchmarks.http_cost``. CPU seconds of the HTTP process.

The app under uvicorn in a process of its own, the real seam to an engine process that computes
nothing (``counting_engine``), and streams at a concurrency from this process. An event is a chunk
that reached its client; the CPU time is the HTTP process's alone, all its threads, as the system
counts it, starts and ends of requests included.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import os
import pstats
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import uvicorn
import uvloop
from rich.console import Console
from rich.table import Table

from model.bundled import bundled_model_path
from service.api.app import create_app
from service.backend import describe
from service.bench.client import Target, fetch, stream
from service.engine.client import EngineClient
from service.engine.options import EngineOptions
from service.http import listener
from service.http.acceptor import HttpServer
from service.http.connections import Connections
from service.registry import ModelRegistry, ServedModel
from service.serve import freeze
from service.settings import Settings
from tests.running import free_port

TARGET = 0.20  # of a core at 1,000 events/s
WORKER = "tests.benchmarks.counting_engine"
CHAT = {"messages": [{"role": "user", "content": "Tell me a story."}]}
WORKLOADS: dict[str, tuple[str, dict[str, Any]]] = {
    "completions": ("/v1/completions", {"prompt": [300] * 100}),
    "completions, stop": (
        "/v1/completions",
        {"prompt": [300] * 100, "stop": ["never so", "\n\n\n"]},
    ),
    "completions, logprobs 5": ("/v1/completions", {"prompt": [300] * 100, "logprobs": 5}),
    "chat": ("/v1/chat/completions", CHAT),
    "chat, usage in each": (
        "/v1/chat/completions",
        CHAT | {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    ),
}


@dataclass(frozen=True)
class Cost:
    workload: str
    events: int
    seconds: float
    cpu: float

    @property
    def share(self) -> float:
        """Of a core, at 1,000 events a second."""
        return 1000 * self.cpu / self.events


# ---- the HTTP process


async def serve(port: int) -> None:
    engine = EngineClient(EngineOptions(model="none", socket=""), worker=WORKER)
    model = ServedModel(["none"], [engine], 4096)
    settings = Settings()
    describe(model, bundled_model_path(), settings)
    config = uvicorn.Config(
        create_app(settings, ModelRegistry([model])),
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
    )
    await engine.start()
    freeze()
    server = HttpServer(config, Connections())
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, setattr, server, "should_exit", True)
    try:
        await server.serve([listener.bind(Settings(port=port))])
    finally:
        await engine.stop()


def run_server(port: int, profile: Path | None) -> None:
    profiler = cProfile.Profile() if profile is not None else None
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        if profiler is not None:
            profiler.enable()
        runner.run(serve(port))
    if profiler is not None:
        profiler.disable()
        profiler.dump_stats(str(profile))


@contextmanager
def serving(tick: float, profile: Path | None) -> Iterator[tuple[Target, psutil.Process]]:
    port = free_port()
    command = [sys.executable, "-m", "tests.benchmarks.http_cost", "--serve", str(port)]
    command += ["--profile", str(profile)] if profile is not None else []
    process = subprocess.Popen(command, env=os.environ | {"TEST_TICK": str(tick)})
    try:
        yield Target(f"http://127.0.0.1:{port}"), psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(20)


# ---- the load


async def wait_ready(target: Target) -> None:
    async with asyncio.timeout(60):
        while True:
            try:
                if (await fetch(target, "/readyz"))[0] == 200:
                    return
            except OSError:
                pass
            await asyncio.sleep(0.1)


async def measure(
    target: Target, http: psutil.Process, name: str, concurrency: int, num_tokens: int
) -> Cost:
    path, body = WORKLOADS[name]
    body = body | {"max_tokens": num_tokens, "stream": True}
    await asyncio.gather(*[stream(target, path, body | {"max_tokens": 5}) for _ in range(8)])
    before, began = sum(http.cpu_times()[:2]), time.monotonic()
    traces = await asyncio.gather(*[stream(target, path, body) for _ in range(concurrency)])
    seconds, cpu = time.monotonic() - began, sum(http.cpu_times()[:2]) - before
    if failed := [trace for trace in traces if not trace.is_good]:
        raise SystemExit(f"{name}: {len(failed)} streams failed: {failed[0].detail}")
    return Cost(name, sum(len(trace.chunks) for trace in traces), seconds, cpu)


async def measure_all(
    target: Target, http: psutil.Process, names: list[str], concurrency: int, num_tokens: int
) -> list[Cost]:
    await wait_ready(target)
    return [await measure(target, http, name, concurrency, num_tokens) for name in names]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--rate", type=float, default=2000, help="events a second the engine gives")
    parser.add_argument("--tokens", type=int, default=200, help="of each stream")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--top", type=int, default=0, help="profile: how many functions to print")
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--profile", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve is not None:
        run_server(given.serve, given.profile)
        return
    with tempfile.TemporaryDirectory() as folder:
        profile = Path(folder) / "profile" if given.top else None
        with serving(given.concurrency / given.rate, profile) as (target, http):
            work = measure_all(target, http, given.workloads, given.concurrency, given.tokens)
            costs = asyncio.run(work)
        if profile is not None:
            pstats.Stats(str(profile)).sort_stats("tottime").print_stats(given.top)
    table = Table("workload", "events", "events/s", "CPU s", "core at 1,000 events/s", "target")
    for cost in costs:
        rate = f"{cost.events / cost.seconds:.0f}"
        met = "met" if cost.share < TARGET else "missed"
        row = (cost.workload, str(cost.events), rate, f"{cost.cpu:.2f}", f"{cost.share:.1%}", met)
        table.add_row(*row)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
