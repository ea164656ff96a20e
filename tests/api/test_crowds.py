"""More connections than are allowed: idle ones give way, health checks get through."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import Iterator

import httpx
import pytest

from service.api.app import create_app
from service.http.connections import SPARE, Connections
from service.registry import ModelRegistry
from service.settings import Settings
from tests.api.fakes import FakeEngine, served
from tests.api.live import IMPATIENT, listening
from tests.api.test_slow_clients import connect, wait_for

LIMIT = 8
LIVE = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"
BODY = json.dumps({"prompt": "Hi", "max_tokens": 60, "stream": True}).encode()
STREAM = (
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\n\r\n%b" % (len(BODY), BODY)
)


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(script=lambda prompt, one: [65])


@pytest.fixture
def book() -> Connections:
    return Connections(LIMIT, IMPATIENT)


@pytest.fixture
def url(engine: FakeEngine, book: Connections) -> Iterator[str]:
    with listening(create_app(Settings(), ModelRegistry([served(engine)])), book) as url:
        yield url


def ask(connection: socket.socket, sent: bytes = LIVE) -> bytes:
    connection.sendall(sent)
    return connection.recv(65536)


def is_open(connection: socket.socket) -> bool:
    try:
        return ask(connection).startswith(b"HTTP/1.1 200")
    except OSError:
        return False


def test_the_longest_idle_connection_gives_way(url: str, book: Connections) -> None:
    idle = [connect(url) for _ in range(LIMIT)]
    for connection in idle:
        assert ask(connection).startswith(b"HTTP/1.1 200")
    assert ask(idle[0]).startswith(b"HTTP/1.1 200")  # now the second is the longest idle
    with connect(url) as newcomer:
        assert ask(newcomer).startswith(b"HTTP/1.1 200")
        assert [is_open(connection) for connection in idle] == [True, False, *[True] * (LIMIT - 2)]
    assert book.ended["gave_way"] == 1
    for connection in idle:
        connection.close()
    assert wait_for(lambda: book.num_open == 0)


def test_where_all_are_busy_only_health_checks_are_answered(
    url: str, engine: FakeEngine, book: Connections
) -> None:
    engine.pause = 0.02
    busy = [connect(url) for _ in range(LIMIT)]
    for connection in busy:
        assert ask(connection, STREAM).startswith(b"HTTP/1.1 200")
    engine.pause = 0.5  # busy for as long as the rest takes
    for path in ("/livez", "/readyz", "/health"):
        assert httpx.get(f"{url}{path}").status_code == 200
    refused = httpx.post(f"{url}/v1/completions", json={"prompt": "Hi"})
    assert refused.status_code == 503
    assert refused.headers["connection"] == "close"
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["code"] == "too_many_connections"
    assert refused.headers["x-request-id"]
    assert len(engine.submitted) == LIMIT
    engine.pause = 0.0
    for connection in busy:
        received = b""
        while not received.endswith(b"0\r\n\r\n"):  # none of them was disturbed
            received += connection.recv(65536)
        assert b"data: [DONE]" in received
    assert httpx.post(f"{url}/v1/completions", json={"prompt": "Hi"}).status_code == 200
    for connection in busy:
        connection.close()
    assert wait_for(lambda: book.num_open == 0)


def test_connections_that_say_nothing_keep_nobody_out(url: str, book: Connections) -> None:
    held = [connect(url) for _ in range(LIMIT + SPARE + 50)]
    for number, connection in enumerate(held[::2]):
        try:
            connection.sendall(b"GET /livez HT"[: number % 13])
        except OSError:
            continue  # it gave way already
    for _ in range(5):
        assert httpx.get(f"{url}/livez").status_code == 200
        assert httpx.post(f"{url}/v1/completions", json={"prompt": "Hi"}).status_code == 200
    assert book.num_open <= LIMIT + SPARE
    for connection in held:
        connection.close()
    assert wait_for(lambda: book.num_open == 0)


NOISE = [
    b"",
    b"\x00",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"SSH-2.0-OpenSSH_9.2\r\n",
    b"\x03\x00\x00\x13\x0e\xe0\x00\x00\x00\x00\x00\x01\x00\x08\x00\x03\x00\x00\x00",
    b"HELP\r\n",
    b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 2000 + b"\r\n",
    b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    os.urandom(3000),
]


@pytest.fixture(scope="module")
def shared_url() -> Iterator[str]:
    """Of one server for all that leaves it as it was."""
    with listening(create_app(Settings(), ModelRegistry([served(FakeEngine())]))) as url:
        yield url


@pytest.mark.parametrize("sent", NOISE[1:])
def test_noise_is_a_400_or_silence_and_the_end_of_the_connection(
    shared_url: str, sent: bytes
) -> None:
    with connect(shared_url) as connection:
        try:
            connection.sendall(sent)
            received = b"".join(iter(lambda: connection.recv(65536), b""))
        except ConnectionError:
            return
    assert received == b"" or received[:12] in (b"HTTP/1.1 400", b"HTTP/1.1 431")
    assert b"server:" not in received.lower()
    if received:
        head, _, body = received.partition(b"\r\n\r\n")
        assert b"x-content-type-options: nosniff" in head.lower()
        assert b"connection: close" in head.lower()
        assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GET /\r\n\r\n", b"400"),
        (b"GET /livez HTTP/1.1\nHost: x\n\n", b"400"),
        (b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n" b"Content-Length: 5\r\n"
         b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 200 + b"\r\n", b"431"),
    ],
)  # fmt: skip
def test_what_could_be_smuggled_is_refused_and_nothing_after_it_is_read(
    shared_url: str, sent: bytes, status: bytes
) -> None:
    with connect(shared_url) as connection:
        connection.sendall(sent + LIVE)
        try:
            received = b"".join(iter(lambda: connection.recv(65536), b""))
        except ConnectionError:
            return
    assert received.startswith(b"HTTP/1.1 " + status)
    assert received.count(b"content-length: ") == 1  # one answer


def test_a_body_that_breaks_while_it_is_being_answered_ends_the_answer(
    url: str, engine: FakeEngine, book: Connections, caplog: pytest.LogCaptureFixture
) -> None:
    """The answer has begun: no second status may follow it, and no exception be left over."""
    head = STREAM.replace(b"Content-Length: %d" % len(BODY), b"Transfer-Encoding: chunked")
    whole = head.replace(BODY, b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY))
    engine.pause = 0.02
    with connect(url) as connection:
        assert ask(connection, whole).startswith(b"HTTP/1.1 200")
        connection.sendall(b"GARBAGE\r\n\r\n")
        received = b"".join(iter(lambda: connection.recv(65536), b""))
    assert b"data: [DONE]" in received
    tail = received.rpartition(b"0\r\n\r\n")[2]
    assert tail.startswith(b"HTTP/1.1 400")  # of the pipelined garbage, after the answer
    assert engine.live == 0
    assert "Fatal error" not in caplog.text


def test_a_scan_leaves_no_connection_and_no_task_behind(url: str, book: Connections) -> None:
    def tasks() -> float:
        text = httpx.get(f"{url}/metrics").text
        (line,) = (one for one in text.splitlines() if one.startswith("pronk:event_loop_tasks "))
        return float(line.split()[1])

    before = tasks()
    for number in range(300):
        with connect(url) as connection:
            connection.sendall(NOISE[number % len(NOISE)])
    assert wait_for(lambda: book.num_open == 0)
    assert wait_for(lambda: tasks() <= before)
    assert httpx.post(f"{url}/v1/completions", json={"prompt": "Hi"}).status_code == 200


async def test_the_app_refuses_by_the_mark_alone(engine: FakeEngine) -> None:
    """Whatever path a crafted request names, only the public ones pass."""
    from service.api.exchange import OVER_LIMIT
    from tests.api.conftest import scope_of

    app = create_app(Settings(), ModelRegistry([served(engine)]))
    for path, status in [("/livez", 200), ("/livez/", 503), ("/v1/models", 503), ("//livez", 503)]:
        sent: list[dict[str, int]] = []

        async def send(message: dict[str, int], sent: list[dict[str, int]] = sent) -> None:
            sent.append(message)

        scope = scope_of(path) | {"method": "GET", "state": {OVER_LIMIT: True}}
        await app(scope, asyncio.Event().wait, send)  # type: ignore[arg-type]
        assert sent[0]["status"] == status
