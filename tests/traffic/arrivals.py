"""Requests as they arrive, however many are unanswered: what a crowd does, and no closed loop."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Coroutine
from typing import Any

Send = Callable[[float], Coroutine[Any, Any, None]]


async def arrive(rate: float, seconds: float, send: Send, seed: int = 0) -> None:
    """``send(due)`` at Poisson times of ``rate`` a second; returns when all are answered."""
    draw, due = random.Random(seed), time.monotonic()
    end, tasks = due + seconds, set[asyncio.Task[None]]()
    while (due := due + draw.expovariate(rate)) < end:
        if (wait := due - time.monotonic()) > 0:
            await asyncio.sleep(wait)
        task = asyncio.create_task(send(due))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)
