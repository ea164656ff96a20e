"""What traces cost a request: processor time with none, and with a collector that is not there.

``python -m tests.benchmarks.tracing``. The engine is a fake that says thirteen tokens.
"""

from __future__ import annotations

import asyncio
import time

from service.api.app import create_app
from service.registry import ModelRegistry
from service.settings import Settings
from service.tracing.exporting import Tracing, traced
from tests.api.conftest import talking_to
from tests.api.fakes import FakeEngine, served

NOBODY = "http://127.0.0.1:9"
ROUNDS, REQUESTS, WARMUP = 5, 300, 50


async def seconds_a_request(tracing: Tracing | None) -> float:
    app = create_app(Settings(), ModelRegistry([served(FakeEngine())]), tracing=tracing)
    async with talking_to(app) as client:
        for number in range(WARMUP + REQUESTS):
            if number == WARMUP:
                began = time.process_time()
            await client.post("/v1/completions", json={"prompt": "x"})
    return (time.process_time() - began) / REQUESTS


def main() -> None:
    off, on = [], []
    with traced(NOBODY) as tracing:
        for _ in range(ROUNDS):
            off.append(asyncio.run(seconds_a_request(None)))
            on.append(asyncio.run(seconds_a_request(tracing)))
    print(f"without traces      {min(off) * 1e6:.0f} us a request (best of {ROUNDS})")
    print(f"to a dead collector {min(on) * 1e6:.0f} us a request")


if __name__ == "__main__":
    main()
