"""A server under mixed traffic and faults for as long as is asked, and everything that was seen.

In ten legs: after each all visitors pause, and whoever is left in the engine, whatever block is
still held and what memory is taken is written down. The engine is killed in the middle of the
second, third and fifth leg; from then on memory is watched.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from dataclasses import dataclass, field

import psutil

from service.bench.problem import BenchProblem
from tests.running import Running, serving
from tests.soak.visitors import KINDS, Kind, stream
from tests.traffic.client import Client
from tests.traffic.processes import Sample, Watch, engine_of, read_books

NUM_LEGS = 10
KILLED = (1, 2, 4)  # legs
NUM_VISITORS = 6
PAUSE = 0.1  # seconds between a visitor's visits, on average
BURST = 60  # requests at once, twice a leg
SERVER = (
    *("--no-sample", "--threads", "1", "--max-num-seqs", "8", "--max-queued-requests", "16"),
    *("--block-size", "32", "--num-kv-blocks", "96", "--ping-interval", "0.5"),
)
AT_REST = {
    "pronk:requests_in_flight": 0.0,
    "vllm:num_requests_running": 0.0,
    "vllm:num_requests_waiting": 0.0,
    "vllm:kv_cache_usage_perc": 0.0,
    "pronk:engine_ready": 1.0,
}


@dataclass
class Visited:
    at: float  # seconds into the soak, when it ended
    kind: str
    ending: str
    seconds: float
    first: float | None
    is_expected: bool  # as if nothing was broken
    was_broken: bool  # the engine was killed, or away, while it was there
    detail: str = ""


@dataclass
class Rest:
    """Between two legs, when nobody is asking."""

    at: float
    unsettled: dict[str, float]  # gauges that had not returned, with their values
    books_differ: float  # received, less finished, failed, cancelled and rejected
    sample: Sample
    num_tasks: float  # of the HTTP process's event loop


@dataclass
class Soak:
    seconds: float
    visits: list[Visited] = field(default_factory=list)
    rests: list[Rest] = field(default_factory=list)
    kills: list[float] = field(default_factory=list)
    back: list[float] = field(default_factory=list)  # seconds a killed engine was away
    samples: list[Sample] = field(default_factory=list)
    books: dict[str, float] = field(default_factory=dict)
    exit_code: int | None = None


class Crowd:
    """The visitors of one leg after the other."""

    def __init__(self, server: Running, soak: Soak, seed: int) -> None:
        self.server = server
        self.soak = soak
        self.draw = random.Random(seed)
        self.start = time.monotonic()
        self.broken_since: float | None = None
        self.broken_until = -1.0

    def now(self) -> float:
        return time.monotonic() - self.start

    async def leg(self, seconds: float, number: int) -> None:
        end = self.now() + seconds
        async with asyncio.TaskGroup() as tasks:
            for _ in range(NUM_VISITORS):
                tasks.create_task(self._visitor(end))
            for part in (0.3, 0.7):
                tasks.create_task(self._burst(seconds * part))
            if number in KILLED:
                tasks.create_task(self._kill(seconds * 0.5))

    async def _visitor(self, end: float) -> None:
        client = Client(self.server.url, reuse=self.draw.random() < 0.7)
        weights = [kind.weight for kind in KINDS]
        while self.now() < end:
            (kind,) = self.draw.choices(KINDS, weights)
            await self._visit(client, kind)
            await asyncio.sleep(self.draw.expovariate(1 / PAUSE))
        await client.close()

    async def _burst(self, delay: float) -> None:
        await asyncio.sleep(delay)
        client, kind = Client(self.server.url, reuse=False), Kind("burst", 0, stream)
        await asyncio.gather(*(self._visit(client, kind) for _ in range(BURST)))

    async def _visit(self, client: Client, kind: Kind) -> None:
        began = self.now()
        async with asyncio.timeout(120):
            answer = await kind.visit(client, random.Random(self.draw.random()))
        ended = self.now()
        broken_since, broken_until = self.broken_since, self.broken_until
        was_broken = broken_since is not None or began <= broken_until
        is_expected = answer.ending in kind.endings
        detail = "" if is_expected else answer.text[:200].decode(errors="replace")
        self.soak.visits.append(
            Visited(
                round(ended, 3),
                kind.name,
                answer.ending,
                round(ended - began, 4),
                answer.first,
                is_expected,
                was_broken,
                detail,
            )
        )

    async def _kill(self, delay: float) -> None:
        """The engine, as the kernel would; whoever comes before it is back is told so."""
        await asyncio.sleep(delay)
        engine = engine_of(psutil.Process(self.server.process.pid))
        assert engine is not None, "there is no engine to kill"
        self.broken_since = self.now()
        os.kill(engine.pid, signal.SIGKILL)
        self.soak.kills.append(self.broken_since)
        watch = Watch(self.server.url, self.server.process.pid)
        async with asyncio.timeout(120):
            while not await self._is_back(watch, engine.pid):  # noqa: ASYNC110 (another process)
                await asyncio.sleep(0.1)
        self.broken_until = self.now()
        self.soak.back.append(self.broken_until - self.broken_since)
        self.broken_since = None

    async def _is_back(self, watch: Watch, old: int) -> bool:
        with contextlib.suppress(psutil.NoSuchProcess):
            sample = await watch.sample(self.now())
            return sample.ready and sample.engine_pid not in (0, old)
        return False

    async def rest(self) -> None:
        """Everybody has gone: so must have all they held, within ten seconds."""
        for _ in range(100):
            books = await read_books(self.server.url)
            unsettled = {
                name: books[name] for name, value in AT_REST.items() if books[name] != value
            }
            if not unsettled:
                break
            await asyncio.sleep(0.1)
        ended = sum(
            books[f"pronk:requests_{how}_total"]
            for how in ("finished", "failed", "cancelled", "rejected")
        )
        differ = books["pronk:requests_received_total"] - ended
        sample = await Watch(self.server.url, self.server.process.pid).sample(self.now())
        tasks = books["pronk:event_loop_tasks"]
        self.soak.rests.append(Rest(self.now(), unsettled, differ, sample, tasks))
        self.soak.books = books


async def _soak(server: Running, soak: Soak, seed: int) -> None:
    crowd = Crowd(server, soak, seed)
    watch = Watch(server.url, server.process.pid, soak.samples)
    watching = asyncio.create_task(watch.run(max(0.5, soak.seconds / 600), crowd.now))
    try:
        for number in range(NUM_LEGS):
            await crowd.leg(soak.seconds / NUM_LEGS, number)
            await crowd.rest()
            if watching.done():
                watching.result()
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


def run(seconds: float, seed: int = 0) -> Soak:
    if seconds < 30:
        raise BenchProblem("a soak takes 30 seconds at least: a killed engine has to come back")
    soak = Soak(seconds)
    with serving(*SERVER) as server:
        asyncio.run(_soak(server, soak, seed))
        soak.exit_code = server.end()
    return soak
