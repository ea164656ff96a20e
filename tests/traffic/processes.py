"""A running server looked at from outside: its processes' memory, its health, its own books."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import psutil

from service.bench.client import Target, fetch

MIB = 1 << 20


@dataclass
class Sample:
    at: float
    http_rss: float  # MiB
    engine_rss: float  # 0 where there is no engine just now
    engine_pid: int
    num_fds: int  # of the HTTP process
    livez: float  # seconds
    ready: bool


@dataclass
class Watch:
    """Samples of one server, taken beside its traffic."""

    url: str
    pid: int
    samples: list[Sample] = field(default_factory=list)

    async def run(self, interval: float, now: Callable[[], float] = time.monotonic) -> None:
        while True:
            self.samples.append(await self.sample(now()))
            await asyncio.sleep(interval)

    async def sample(self, at: float) -> Sample:
        http = psutil.Process(self.pid)
        engine = engine_of(http)
        started = time.monotonic()
        alive = await self._status("/livez")
        seconds = time.monotonic() - started
        return Sample(
            at,
            http.memory_info().rss / MIB,
            _rss(engine),
            engine.pid if engine is not None else 0,
            http.num_fds(),
            seconds if alive == 200 else float("inf"),
            await self._status("/readyz") == 200,
        )

    async def _status(self, path: str) -> int:
        try:
            return (await fetch(Target(self.url, timeout=30), path))[0]
        except (OSError, EOFError):
            return 0


def _rss(process: psutil.Process | None) -> float:
    try:
        return process.memory_info().rss / MIB if process is not None else 0.0
    except psutil.NoSuchProcess:
        return 0.0


def engine_of(http: psutil.Process) -> psutil.Process | None:
    """The engine is the largest of the server's children; the others try grammars for it."""
    sizes: list[tuple[float, int, psutil.Process]] = []
    for child in http.children():
        with contextlib.suppress(psutil.NoSuchProcess):
            sizes.append((child.memory_info().rss, child.pid, child))
    return max(sizes)[2] if sizes else None


@contextlib.asynccontextmanager
async def watching(url: str, pid: int, interval: float = 0.5) -> AsyncIterator[Watch]:
    watch = Watch(url, pid)
    task = asyncio.create_task(watch.run(interval))
    try:
        yield watch
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def read_books(url: str) -> dict[str, float]:
    """Each metric's value, summed over its labels; beside it each reason of a rejection."""
    _, _, body = await fetch(Target(url, timeout=30), "/metrics")
    return parse_books(body.decode())


def parse_books(text: str) -> dict[str, float]:
    books: dict[str, float] = {}
    for line in text.splitlines():
        if line.startswith("#"):
            continue
        name, _, value = line.rpartition(" ")
        bare = name.partition("{")[0]
        books[bare] = books.get(bare, 0.0) + float(value)
        if reason := re.search(r'reason="(\w+)"', name):
            key = f"{bare}:{reason[1]}"
            books[key] = books.get(key, 0.0) + float(value)
    return books
