"""A real ``pronk serve`` in a process of its own, for tests that look at it from outside."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import httpx

ROOT = Path(__file__).resolve().parent.parent
START_TIMEOUT = 90.0


@dataclass
class Running:
    """A started server: its address, its process, and all it has printed so far."""

    url: str
    process: subprocess.Popen[bytes]
    log: IO[bytes]

    def output(self) -> str:
        self.log.seek(0)
        return self.log.read().decode(errors="replace")

    def wait_ready(self) -> None:
        wait_until(lambda: self._readiness() == 200, "the server to become ready", self)

    def _readiness(self) -> int:
        try:
            return httpx.get(f"{self.url}/readyz", timeout=5).status_code
        except httpx.TransportError:
            return 0

    def end(self, number: int = signal.SIGTERM, timeout: float = 40) -> int:
        """Send a signal and wait; the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(timeout)


def wait_until(condition: object, what: str, server: Running | None = None) -> None:
    assert callable(condition)
    end = time.monotonic() + START_TIMEOUT
    while time.monotonic() < end:
        if condition():
            return
        if server is not None and server.process.poll() is not None:
            raise AssertionError(f"the server ended while waiting for {what}:\n{server.output()}")
        time.sleep(0.02)
    raise AssertionError(f"waited too long for {what}" + (f"\n{server.output()}" if server else ""))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serving(
    *arguments: str, ready: bool = True, port: int | None = None, **environment: str
) -> Iterator[Running]:
    """``pronk serve ARGUMENTS`` on a free port; killed at the end if it still runs."""
    port = port or free_port()
    command = [sys.executable, "-m", "service.cli", "serve", *arguments, "--port", str(port)]
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PRONK_")}
    inherited |= {
        "PRONK_LEDGER": "none",
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "default",
        **environment,
    }
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=inherited, cwd=tempfile.gettempdir()
        )
        server = Running(f"http://127.0.0.1:{port}", process, log)
        try:
            if ready:
                server.wait_ready()
            yield server
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
