"""How many requests are under way, and when each is sent."""

from __future__ import annotations

import asyncio
import itertools
import time

import pytest

from service.bench.client import Target, Trace
from service.bench.load import Asking, Level, run
from service.bench.workload import Lengths, Workload, poisson_arrivals
from tests.bench.scripted_server import Call, answer, answering

WORKLOAD = Workload(Lengths(4, 4), Lengths(3, 3))


async def slowly(call: Call) -> None:
    await asyncio.sleep(0.05)
    await answer(call)


async def test_a_fixed_concurrency_is_kept_and_never_passed() -> None:
    seen: list[Trace] = []
    async with answering(slowly) as server:
        level = Level("concurrency", 3)
        traces, seconds = await run(
            Target(server.url), Asking(), level, WORKLOAD.jobs(7), observe=seen.append
        )
    assert len(traces) == len(server.calls) == 7
    assert server.most_live == 3
    assert all(trace.is_good for trace in traces)
    assert seen == traces
    assert 0.15 <= seconds < 2, "three waves of 0.05 s"


async def test_arrivals_wait_for_nobody_and_keep_their_times() -> None:
    async with answering(slowly) as server:
        began = time.monotonic()
        level = Level("rate", 100.0)
        traces, _ = await run(Target(server.url), Asking(), level, WORKLOAD.jobs(20), seed=5)
    due = [began + at for at in poisson_arrivals(100.0, 20, seed=5)]
    assert server.most_live > 3
    # a request counts from when it was due, not from when the loop got round to it
    assert [trace.start for trace in traces] == pytest.approx(due, abs=0.05)
    gaps = [b.start - a.start for a, b in itertools.pairwise(traces)]
    assert gaps == pytest.approx([b - a for a, b in itertools.pairwise(due)])


async def test_a_failed_request_does_not_stop_the_others() -> None:
    calls = 0

    async def talk(call: Call) -> None:
        nonlocal calls
        calls += 1
        if calls % 2:
            await call.whole("429 Too Many Requests", {"error": {"message": "full"}})
        else:
            await answer(call)

    async with answering(talk) as server:
        level = Level("concurrency", 1)
        traces, _ = await run(Target(server.url), Asking(), level, WORKLOAD.jobs(4))
    assert [trace.failure for trace in traces] == ["refused", "", "refused", ""]
