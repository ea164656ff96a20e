"""What only a real socket shows: unread bodies, slow clients, silence, reused connections."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Iterator

import httpx
import pytest

from service.api.app import create_app
from service.engine.generation import Generation
from service.engine.messages import Output
from service.registry import ModelRegistry
from service.settings import Settings
from tests.api.conftest import Reader, chunks_of, scope_of, until
from tests.api.fakes import FakeEngine, FakeGeneration, served
from tests.api.live import listening

URL = "/v1/completions"
SETTINGS = Settings(api_key=["key"], max_body_bytes=4096, body_timeout=0.3)
KEY = b"Authorization: Bearer key\r\n"


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def url(engine: FakeEngine) -> Iterator[str]:
    with listening(create_app(SETTINGS, ModelRegistry([served(engine)]))) as url:
        yield url


def exchange(url: str, request: bytes) -> bytes:
    """Send ``request`` and read until the server closes or falls silent for two seconds."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=2) as connection:
        connection.sendall(request)
        answer = b""
        try:
            while part := connection.recv(65536):
                answer += part
        except TimeoutError:
            pass
        return answer


def post(headers: bytes, body: bytes = b"") -> bytes:
    start = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    return start + b"Content-Type: application/json\r\n" + headers + b"\r\n" + body


def test_a_stranger_is_refused_before_the_body_comes(url: str) -> None:
    answer = exchange(url, post(b"Content-Length: 4000\r\nExpect: 100-continue\r\n"))
    assert answer.startswith(b"HTTP/1.1 401")
    assert b"100 Continue" not in answer


def test_a_stated_length_over_the_limit_is_refused_at_once(url: str) -> None:
    begin = time.monotonic()
    answer = exchange(url, post(KEY + b"Content-Length: 99999999\r\n", b"{"))
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"request_too_large" in answer
    assert time.monotonic() - begin < 2


def test_a_body_that_stops_coming_is_given_up(url: str) -> None:
    answer = exchange(url, post(KEY + b"Content-Length: 100\r\n", b'{"prompt"'))
    assert answer.startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize("sent", [b"", b"GET /livez HT", b"GET /livez HTTP/1.1\r\nHost: x\r\n"])
def test_a_head_that_never_ends_is_given_up(url: str, sent: bytes) -> None:
    begin = time.monotonic()
    assert exchange(url, sent) == b""
    assert time.monotonic() - begin < 1.9


def test_a_second_head_that_never_ends_is_given_up_and_a_slow_answer_is_not(
    url: str, engine: FakeEngine
) -> None:
    engine.pause, engine.script = 0.1, lambda prompt, one: [65] * 8
    body = b'{"prompt": "Hi", "max_tokens": 8}'
    whole = post(KEY + b"Content-Length: %d\r\n" % len(body), body)
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=2) as connection:
        begin = time.monotonic()
        connection.sendall(whole.replace(b"Connection: close\r\n", b""))
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        assert time.monotonic() - begin > 0.7
        connection.sendall(b"GET /livez")
        assert connection.recv(65536) == b""


@pytest.mark.parametrize(
    "sent",
    [b"GARBAGE\r\n\r\n", b"\x16\x03\x01\r\n\r\n", b"GET /livez HTTP/1.1\r\n\r\n"],
)
def test_what_is_no_http_gets_the_envelope_too(url: str, sent: bytes) -> None:
    head, _, body = exchange(url, sent).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400")
    assert json.loads(body)["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("protocol", [b"h2c", b"websocket"])
def test_an_offered_upgrade_is_passed_over_in_silence(
    url: str, protocol: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    offer = b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, close\r\nUpgrade: "
    assert exchange(url, offer + protocol + b"\r\n\r\n").startswith(b"HTTP/1.1 200")
    assert not caplog.records


def test_answers_name_no_server_software(url: str) -> None:
    headers = httpx.get(f"{url}/livez").headers
    assert "server" not in headers


def test_a_connection_is_reused_after_answers_and_refusals(url: str) -> None:
    headers = {"Authorization": "Bearer key"}
    with httpx.Client(base_url=url, headers=headers, limits=httpx.Limits(max_connections=1)) as one:
        for _ in range(5):
            assert one.post(URL, json={"prompt": "Hi"}).status_code == 200
            assert one.post(URL, json={"prompt": ""}).status_code == 400
            body = {"prompt": "Hi", "stream": True}
            assert one.post(URL, json=body).text.endswith("[DONE]\n\n")


def test_a_storm_of_hangups_leaves_nothing_behind(url: str, engine: FakeEngine) -> None:
    engine.pause, engine.script = 0.01, lambda prompt, one: [65]
    host, port = url.removeprefix("http://").split(":")
    connections = []
    for number in range(60):
        body = json.dumps({"prompt": "Hi", "max_tokens": 150, "stream": number % 2 == 0}).encode()
        connection = socket.create_connection((host, int(port)))
        connection.sendall(post(KEY + b"Content-Length: %d\r\n" % len(body), body))
        connections.append(connection)
    time.sleep(0.1)
    for connection in connections:
        connection.close()
    end = time.monotonic() + 3
    while engine.live and time.monotonic() < end:
        time.sleep(0.01)
    assert engine.live == 0
    text = httpx.get(f"{url}/metrics", headers={"Authorization": "Bearer key"}).text
    assert "pronk:requests_in_flight 0.0" in text


async def test_a_slow_reader_gets_merged_text_and_holds_nobody_up() -> None:
    engine = MergingEngine()
    app = create_app(Settings(), ModelRegistry([served(engine)]))
    reader = Reader({"prompt": "Hi", "stream": True, "max_tokens": 150})
    task = asyncio.create_task(app(scope_of(URL), reader.receive, reader.send))
    await until(lambda: engine.generations)
    await asyncio.sleep(0.05)
    for number in range(150):
        engine.real[0].push(
            Output(
                id=0,
                choice=0,
                tokens=[65],
                finish_reason="length" if number == 149 else None,
            )
        )
        await asyncio.sleep(0)
    reader.may_read.set()
    await task
    chunks = chunks_of(reader.text)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "A" * 150
    assert len(chunks) <= 3


class MergingEngine(FakeEngine):
    """Gives out the engine client's real generations; the test pushes what the engine would."""

    def __init__(self) -> None:
        super().__init__()
        self.real: list[Generation] = []

    def generation(self, *_: object) -> FakeGeneration:
        generation = Generation(0, 1, lambda choice: None)
        self.real.append(generation)
        return generation  # type: ignore[return-value]
