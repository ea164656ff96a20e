"""What connections cost a running server: memory of idle ones, time of new ones and of requests.

``python -m tests.benchmarks.connections [--count 10000]``
"""

from __future__ import annotations

import argparse
import resource
import socket
import time
from contextlib import ExitStack
from urllib.parse import urlsplit

import psutil

from tests.running import serving

LIVE = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"


def ask(connection: socket.socket) -> None:
    connection.sendall(LIVE)
    received = b""
    while not received.endswith(b"}"):
        received += connection.recv(4096)


def timed(address: tuple[str, int], times: int, *, is_kept: bool) -> float:
    """Microseconds of one health check after the other."""
    begin = time.perf_counter()
    with ExitStack() as stack:
        kept = stack.enter_context(socket.create_connection(address)) if is_kept else None
        for _ in range(times):
            if kept is not None:
                ask(kept)
                continue
            with socket.create_connection(address) as connection:
                ask(connection)
    return (time.perf_counter() - begin) / times * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    count = parser.parse_args().count
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with serving("--no-sample", "--keep-alive", "600") as server, ExitStack() as stack:
        where = urlsplit(server.url)
        address = (str(where.hostname), int(where.port or 0))
        process = psutil.Process(server.process.pid)
        timed(address, 500, is_kept=False)
        print(f"a new connection and a health check: {timed(address, 2000, is_kept=False):.0f} us")
        print(f"a health check on a kept one: {timed(address, 2000, is_kept=True):.0f} us")
        before = process.memory_info().rss
        for _ in range(count):
            ask(stack.enter_context(socket.create_connection(address)))
        each = (process.memory_info().rss - before) / count
        print(f"{count} idle connections: {each / 1024:.1f} KiB each")
        print(f"a new one beside them: {timed(address, 2000, is_kept=False):.0f} us")


if __name__ == "__main__":
    main()
