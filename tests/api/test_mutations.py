"""Good requests made bad at random places, in random pieces: no exception, and nothing left."""

from __future__ import annotations

import logging
import random
import socket
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx
import pytest

from service.api.app import create_app
from service.http.connections import Connections
from service.registry import ModelRegistry
from service.settings import Settings
from tests.api.fakes import FakeEngine, served
from tests.api.live import IMPATIENT, listening
from tests.api.test_slow_clients import connect, wait_for

BODY = b'{"prompt": "Hi", "max_tokens": 5, "stream": true}'
POST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\na\r\n%b\r\n%x\r\n%b\r\n0\r\n\r\n"
GOOD = [
    b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n",
    b"HEAD /health HTTP/1.0\r\n\r\n",
    POST + b"Content-Length: %d\r\n\r\n%b" % (len(BODY), BODY),
    POST + CHUNKED % (BODY[:10], len(BODY) - 10, BODY[10:]),
    b"POST /nowhere HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 20\r\n\r\n"
    + b"x" * 20,
]
INSERTS = [b"\r\n", b"\n", b"\0", b" ", b"Content-Length: 3\r\n", b"0\r\n\r\n", b"\xff" * 300]
NUM_CONNECTIONS = 500


def mutated(chance: random.Random) -> bytes:
    data = bytearray(chance.choice(GOOD))
    for _ in range(chance.choice([0, 0, 1, 1, 2, 5])):
        place = chance.randrange(len(data))
        match chance.randrange(4):
            case 0:
                data[place] = chance.randrange(256)
            case 1:
                del data[place : place + chance.randrange(1, 30)]
            case 2:
                data[place:place] = chance.choice(INSERTS)
            case _:
                data[place:place] = data[: chance.randrange(len(data))]
        data = data or bytearray(b"x")
    return bytes(data)


def send(address: tuple[str, int], chance: random.Random) -> socket.socket:
    connection = socket.create_connection(address, timeout=5)
    data = b"".join(mutated(chance) for _ in range(chance.choice([1, 1, 2, 4])))
    try:
        while data:
            size = chance.choice([len(data), chance.randrange(1, len(data) + 1)])
            connection.sendall(data[:size])
            data = data[size:]
        if chance.random() < 0.6:
            connection.settimeout(0.05)
            connection.recv(65536)
    except (ConnectionError, TimeoutError):
        pass  # it was refused by then, or is waited for
    return connection


def test_mutated_requests_raise_nothing_and_leave_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    chance = random.Random(5)
    engine = FakeEngine(script=lambda prompt, one: [65])
    book = Connections(12, IMPATIENT)
    app = create_app(Settings(body_timeout=0.3), ModelRegistry([served(engine)]))
    with caplog.at_level(logging.ERROR), listening(app, book) as url:
        where = urlsplit(url)
        held: list[socket.socket] = []
        for _ in range(NUM_CONNECTIONS):
            connection = send((str(where.hostname), int(where.port or 0)), chance)
            if chance.random() < 0.3:
                held.append(connection)
            else:
                connection.close()
            if len(held) > 20:
                held.pop(chance.randrange(len(held))).close()
        assert httpx.get(f"{url}/livez").status_code == 200
        for connection in held:
            connection.close()
        assert wait_for(lambda: book.num_open == 0)
        assert wait_for(lambda: engine.live == 0)
        assert book.num_waiting == 0
        assert not book._writing
    assert [record.getMessage() for record in caplog.records] == []
    assert book.ended["malformed"] > NUM_CONNECTIONS / 10


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    engine = FakeEngine(script=lambda prompt, one: [65], pause=0.02)
    with listening(create_app(Settings(), ModelRegistry([served(engine)]))) as url:
        yield url


def test_bytes_after_a_last_request_do_not_cost_it_its_answer(url: str) -> None:
    last = GOOD[2].replace(b"Host: x\r\n", b"Host: x\r\nConnection: close\r\n")
    with connect(url) as connection:
        connection.sendall(last + b"what nobody asked for")
        received = b"".join(iter(lambda: connection.recv(65536), b""))
    assert received.startswith(b"HTTP/1.1 200")
    assert b"data: [DONE]" in received


def test_a_head_request_whose_body_breaks_is_refused_without_a_body(url: str) -> None:
    broken = b"HEAD /livez HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nXYZ\r\n"
    with connect(url) as connection:
        connection.sendall(broken)
        received = b"".join(iter(lambda: connection.recv(65536), b""))
    assert received.startswith(b"HTTP/1.1 400")
    assert received.endswith(b"\r\n\r\n")
