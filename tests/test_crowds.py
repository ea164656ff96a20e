"""A real server under crowds: thousands of idle connections, no descriptors left, storms."""

from __future__ import annotations

import functools
import resource
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from tests.running import Running, serving
from tests.storm import POINTS, read_books, settled, solo_text, storm

NUM_IDLE = 4_000
LIVE = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"
PROMPTS = ["Once upon a time", "The sea was", "A dog and a cat", "In the old house", "The king"]
MAX_TOKENS = 10


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving("--no-sample", "--keep-alive", "120") as running:
        yield running


@contextmanager
def descriptors(wanted: int) -> Iterator[None]:
    """At least so many for this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < wanted:
        pytest.skip(f"this machine allows {hard} descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def connect(server: Running, stack: ExitStack) -> socket.socket:
    where = urlsplit(server.url)
    return stack.enter_context(socket.create_connection((where.hostname, where.port), timeout=10))


def ask(connection: socket.socket) -> bytes:
    connection.sendall(LIVE)
    received = b""
    while not received.endswith(b"}") and (part := connection.recv(4096)):
        received += part
    return received


def complete(server: Running) -> httpx.Response:
    body = {"prompt": "Once", "max_tokens": 3}
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=20)


def test_thousands_of_idle_connections_cost_little_and_nobody_waits_for_them(
    server: Running,
) -> None:
    process = psutil.Process(server.process.pid)
    with descriptors(NUM_IDLE + 500):
        assert complete(server).status_code == 200
        before = process.memory_info().rss
        with ExitStack() as stack:
            idle = [connect(server, stack) for _ in range(NUM_IDLE)]
            for connection in idle:
                assert ask(connection).startswith(b"HTTP/1.1 200")
            assert process.num_fds() > NUM_IDLE
            each = (process.memory_info().rss - before) / NUM_IDLE
            assert each < 64 * 1024
            assert httpx.get(f"{server.url}/readyz").status_code == 200
            assert complete(server).status_code == 200
            assert all(ask(connection).startswith(b"HTTP/1.1 200") for connection in idle[::100])
    end = time.monotonic() + 20
    while process.num_fds() > 200 and time.monotonic() < end:
        time.sleep(0.05)
    assert process.num_fds() < 200


def test_where_descriptors_run_out_idle_connections_give_way_and_nothing_spins(
    server: Running,
) -> None:
    """The limit is taken down beneath a running server: its own could not be passed."""
    process = psutil.Process(server.process.pid)
    usual = process.rlimit(psutil.RLIMIT_NOFILE)
    process.rlimit(psutil.RLIMIT_NOFILE, (process.num_fds() + 30, usual[1]))
    try:
        with ExitStack() as stack:
            silent = [connect(server, stack) for _ in range(100)]
            time.sleep(0.5)
            spent = sum(process.cpu_times()[:2])
            time.sleep(1)
            assert sum(process.cpu_times()[:2]) - spent < 0.7
            assert complete(server).status_code == 200
            assert httpx.get(f"{server.url}/livez").status_code == 200
            assert len(silent) == 100
    finally:
        process.rlimit(psutil.RLIMIT_NOFILE, usual)
    assert complete(server).status_code == 200
    assert server.output().count("no connection can be taken") < 50


def test_what_clients_send_reaches_no_log_and_noise_fills_none(server: Running) -> None:
    """Keys in query strings, in headers, in heads that are none: nothing of them is written."""
    canary = "canary-7f3a"
    paths = ("/livez", "/nowhere", "/v1/completions", "/v1/models", "/docs", f"/{canary}")
    for path in paths:
        url = f"{server.url}{path}?api_key={canary}"
        httpx.get(url, headers={"Upgrade": canary, "Connection": "upgrade", "X-Api-Key": canary})
        httpx.post(url, content=f'{{"{canary}'.encode())
        httpx.request(canary.upper(), url, content=canary)
    noise = f"GET /?api_key={canary} HTTP/9.9\r\nAuthorization: Bearer {canary}\r\n\r\n".encode()
    before = len(server.output())
    began = time.monotonic()
    for _ in range(1_000):
        with ExitStack() as stack:
            connect(server, stack).sendall(noise)
    assert complete(server).status_code == 200
    lines = server.output()[before:].splitlines()
    assert len(lines) < 30 + (time.monotonic() - began)
    assert canary not in server.output().lower()


async def storms(server: Running, sizes: list[int]) -> list[list[int]]:
    """Storm after storm, each leaving nothing behind; both processes' memory after each."""
    process = psutil.Process(server.process.pid)
    read = functools.partial(read_books, server.url, process)
    _, alone = await storm(server.url, 40, 1, PROMPTS, MAX_TOKENS)  # warm
    texts = {prompt: await solo_text(server.url, prompt, MAX_TOKENS) for prompt in PROMPTS}
    assert len(set(texts.values())) == len(PROMPTS)
    assert all(texts[prompt] == text for prompt, text in alone)
    before = await settled(read, read())
    assert len(before.descriptors) == 2, "the engine's process was not found"
    resident = [before.resident]
    for number, size in enumerate(sizes):
        points, stayed = await storm(server.url, size, 2 + number, PROMPTS, MAX_TOKENS)
        assert set(points) == set(POINTS)
        assert [text for prompt, text in stayed] == [texts[prompt] for prompt, _ in stayed]
        after = await settled(read, before)
        assert after.is_balanced
        assert after.is_idle
        assert after.is_no_more_than(before), (before, after)
        assert after.sum("pronk:requests_received_total") > before.sum(
            "pronk:requests_received_total"
        )
        assert after.sum("pronk:requests_failed_total") == 0
        resident.append(after.resident)
    return resident


async def test_a_storm_of_clients_that_leave_anywhere_leaves_nothing_behind(
    server: Running,
) -> None:
    await storms(server, [1_000])


@pytest.mark.slow
async def test_storm_after_storm_memory_has_no_slope(server: Running) -> None:
    """It may grow in the first ones, and no more from then on."""
    resident = await storms(server, [1_000] * 8)
    for name, series in zip(("HTTP", "engine"), zip(*resident, strict=True), strict=True):
        print(f"MiB of the {name} process after each storm:", [one >> 20 for one in series])
        assert series[-1] - series[3] < 8 << 20, series
