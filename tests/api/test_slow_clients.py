"""Clients that write or read too slowly, or not at all: they end, and cost nobody else anything."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator

import httpx
import pytest

from service.api.app import create_app
from service.http.acceptor import UNSENT
from service.http.connections import Connections, Patience
from service.registry import ModelRegistry
from service.settings import Settings
from tests.api.fakes import FakeEngine, served
from tests.api.live import IMPATIENT, listening

SETTINGS = Settings(api_key=["key"], max_body_bytes=1 << 20, body_timeout=0.4)
AUTHORIZED = {"Authorization": "Bearer key"}
LONG = {"prompt": "Hi", "stream": True, "max_tokens": 150, "n": 64}  # 2 MB of events


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(script=lambda prompt, one: [65])


@pytest.fixture
def book() -> Connections:
    return Connections(patience=IMPATIENT)


@pytest.fixture
def url(engine: FakeEngine, book: Connections) -> Iterator[str]:
    app = create_app(SETTINGS, ModelRegistry([served(engine)]))
    with listening(app, book, keep_alive=1) as url:
        yield url


def connect(url: str, receive_buffer: int | None = None) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    made = socket.socket()
    if receive_buffer is not None:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    made.settimeout(20)
    made.connect((host, int(port)))
    return made


def head(length: int, headers: str = "Authorization: Bearer key\r\n") -> bytes:
    return (
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"{headers}Content-Length: {length}\r\n\r\n"
    ).encode()


def request(body: dict[str, object]) -> bytes:
    encoded = json.dumps(body).encode()
    return head(len(encoded)) + encoded


def drip(connection: socket.socket, pieces: list[bytes], pause: float) -> int:
    """Send them one by one until the other side ends it; how many were sent."""
    for number, piece in enumerate(pieces):
        try:
            connection.sendall(piece)
        except OSError:
            return number
        time.sleep(pause)
    return len(pieces)


def wait_for(condition: object, seconds: float = 20) -> bool:
    assert callable(condition)
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return bool(condition())


# ---- slow writers


def test_a_body_that_drips_is_given_up_though_it_never_stops(url: str) -> None:
    with connect(url) as connection:
        connection.sendall(head(1000))
        drip(connection, [b" "] * 15, 0.1)
        assert connection.recv(65536).startswith(b"HTTP/1.1 408")
        assert drip(connection, [b" "] * 100, 0.1) < 100  # nor does it hold the connection


def test_a_slow_body_that_gets_on_is_read(url: str) -> None:
    """A second in all, more than it may be silent; each piece earns more time than it takes."""
    body = b'{"prompt": "Hi", "max_tokens": 2' + b" " * 80_000 + b"}"
    pieces = [body[i : i + 8000] for i in range(0, len(body), 8000)]
    with connect(url) as connection:
        connection.sendall(head(len(body)))
        assert drip(connection, pieces, 0.1) == len(pieces)
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")


def test_a_head_that_drips_is_given_up_though_it_never_stops(url: str, book: Connections) -> None:
    with connect(url) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\n")
        assert drip(connection, [b"X: y\r\n"] * 50, 0.1) < 50
    assert book.ended["head_timeout"] == 1


def test_the_rest_of_a_refused_body_is_not_waited_for_for_ever(url: str, book: Connections) -> None:
    with connect(url) as connection:
        connection.sendall(head(100_000, ""))
        assert connection.recv(65536).startswith(b"HTTP/1.1 401")
        assert drip(connection, [b"x"] * 60, 0.05) < 60
    assert book.ended["linger_timeout"] == 1


def test_a_refused_body_that_comes_after_all_leaves_the_connection_usable_and_then_idle(
    url: str, book: Connections
) -> None:
    with connect(url) as connection:
        connection.sendall(head(20, ""))
        assert connection.recv(65536).startswith(b"HTTP/1.1 401")
        connection.sendall(b"x" * 20)
        connection.sendall(request({"prompt": "Hi", "max_tokens": 2}))
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        connection.sendall(head(20, ""))
        assert connection.recv(65536).startswith(b"HTTP/1.1 401")
        connection.sendall(b"x" * 20)
        assert connection.recv(65536) == b""  # keep-alive holds here too
    assert wait_for(lambda: book.num_open == 0)


# ---- readers


def test_a_reader_that_takes_nothing_is_ended_and_its_generation_with_it(
    url: str, engine: FakeEngine, book: Connections
) -> None:
    with connect(url, receive_buffer=4096) as connection:
        connection.sendall(request(LONG))
        assert wait_for(lambda: engine.live == 1)
        assert wait_for(lambda: engine.live == 0)
        assert engine.generations[0].given < 64 * 150
        assert wait_for(lambda: book.num_open == 0)
    assert book.ended["write_timeout"] == 1
    text = httpx.get(f"{url}/metrics", headers=AUTHORIZED).text
    assert "pronk:requests_cancelled_total 1.0" in text
    assert 'pronk:connections_ended_total{reason="write_timeout"} 1.0' in text


def test_a_slow_reader_that_lives_gets_all_and_others_their_own_meanwhile(
    url: str, engine: FakeEngine, book: Connections
) -> None:
    """It takes longer than the write timeout, and never that long over one piece."""
    received = b""
    with connect(url, receive_buffer=4096) as connection:
        connection.sendall(request(LONG))
        begin = time.monotonic()
        while not received.endswith(b"0\r\n\r\n"):
            part = connection.recv(40_000)
            assert part, "it was ended"
            received += part
            if time.monotonic() - begin < 1.5:
                time.sleep(0.05)
                answer = httpx.post(
                    f"{url}/v1/completions",
                    json={"prompt": "Hi", "max_tokens": 3},
                    headers=AUTHORIZED,
                    timeout=10,
                )
                assert answer.status_code == 200
    assert received.count(b"data: [DONE]") == 1
    assert received.count(b'"finish_reason":"length"') == 64
    assert book.ended["write_timeout"] == 0


def test_what_is_kept_for_a_reader_is_bounded(engine: FakeEngine) -> None:
    """By the loop's high-water mark and a chunk; behind it nothing is made that nobody takes."""
    book = Connections(patience=Patience(write=30))
    with (
        listening(create_app(SETTINGS, ModelRegistry([served(engine)])), book) as url,
        connect(url, receive_buffer=4096) as connection,
    ):
        connection.sendall(request(LONG))
        assert wait_for(lambda: engine.generations and engine.generations[0].given > 100)
        time.sleep(0.5)
        given = engine.generations[0].given
        (link,) = book._writing
        assert 0 < link.transport.pending <= 65536 + 4096  # type: ignore[attr-defined]
        time.sleep(0.3)
        assert engine.generations[0].given == given
        # one event is about 200 bytes: here, in the system's send buffer, on the other side
        assert given * 200 < 65536 + 2 * UNSENT + 400_000


def test_peers_that_vanish_are_looked_for(url: str, book: Connections) -> None:
    """The options by which the system finds them; ``tests/test_half_open.py`` cuts a wire."""
    with connect(url):
        assert wait_for(lambda: book.num_open == 1)
        (link,) = book._open
        accepted = link.transport.get_extra_info("socket")  # type: ignore[attr-defined]

        def option(name: str) -> int:
            return int(accepted.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)))

        assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        silence = option("TCP_KEEPIDLE") + option("TCP_KEEPINTVL") * option("TCP_KEEPCNT")
        assert silence <= 60
        assert option("TCP_USER_TIMEOUT") == 1000  # ms, of data that nobody acknowledges
        assert option("TCP_NODELAY")
        assert option("TCP_NOTSENT_LOWAT") == UNSENT
