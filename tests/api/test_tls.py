"""TLS by a certificate made here: answers, the least version, and greetings that never end."""

from __future__ import annotations

import json
import shutil
import socket
import ssl
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from service.api.app import create_app
from service.http.connections import Connections
from service.registry import ModelRegistry
from service.settings import Settings
from tests.api.conftest import chunks_of
from tests.api.fakes import FakeEngine, served
from tests.api.live import IMPATIENT, listening
from tests.api.test_slow_clients import wait_for

LIMIT = 4


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For 127.0.0.1, signed by itself; its key is ``key.pem`` beside it."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed: it makes the certificate")
    folder = tmp_path_factory.mktemp("tls")
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    command += ["-nodes", "-days", "2", "-subj", "/CN=pronk", "-addext"]
    command += ["subjectAltName=IP:127.0.0.1", "-keyout", "key.pem", "-out", "certificate.pem"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return folder / "certificate.pem"


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(script=lambda prompt, one: [65])


@pytest.fixture
def book() -> Connections:
    return Connections(LIMIT, IMPATIENT)


@pytest.fixture
def url(certificate: Path, engine: FakeEngine, book: Connections) -> Iterator[str]:
    app = create_app(Settings(), ModelRegistry([served(engine)]))
    key = certificate.with_name("key.pem")
    with listening(app, book, certificate=certificate, key=key) as url:
        yield url


@pytest.fixture
def trust(certificate: Path) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(certificate))


def tcp(url: str) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=5)


def test_answers_whole_and_streamed_come_over_tls(url: str, trust: ssl.SSLContext) -> None:
    with httpx.Client(base_url=url, verify=trust) as client:
        body = {"prompt": "Hi", "max_tokens": 5}
        whole = client.post("/v1/completions", json=body)
        assert whole.json()["choices"][0]["text"] == "AAAAA"
        stream = client.post("/v1/completions", json=body | {"stream": True})
        texts = [chunk["choices"][0]["text"] for chunk in chunks_of(stream.text)]
        assert "".join(texts) == "AAAAA"


def test_a_stranger_to_the_certificate_is_not_spoken_to_and_old_versions_are_refused(
    url: str, trust: ssl.SSLContext, book: Connections
) -> None:
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx.get(f"{url}/livez")
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        trust.minimum_version = trust.maximum_version = ssl.TLSVersion.TLSv1_1
    trust.set_ciphers("ALL:@SECLEVEL=0")
    with tcp(url) as connection, pytest.raises((ssl.SSLError, ConnectionError)):
        trust.wrap_socket(connection, server_hostname="127.0.0.1")
    assert wait_for(lambda: book.num_open == 0)


@pytest.mark.parametrize("sent", [b"", b"\x16\x03\x01", b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"])
def test_a_greeting_that_is_none_or_never_ends_is_given_up(
    url: str, sent: bytes, book: Connections
) -> None:
    with tcp(url) as connection:
        connection.sendall(sent)
        assert wait_for(lambda: book.ended["no_handshake"] == 1)
        assert book.num_open == 0
        try:
            received = b"".join(iter(lambda: connection.recv(4096), b""))
        except ConnectionError:
            received = b""
        assert not received.startswith(b"HTTP")


def test_greetings_that_never_end_are_counted_and_keep_nobody_out(
    url: str, trust: ssl.SSLContext, book: Connections
) -> None:
    silent = [tcp(url) for _ in range(3 * LIMIT)]
    for _ in range(3):
        assert httpx.get(f"{url}/livez", verify=trust).status_code == 200
    assert book.num_open <= LIMIT
    for connection in silent:
        connection.close()
    assert wait_for(lambda: book.num_open == 0)


def test_a_reader_that_takes_nothing_is_ended_over_tls_too(
    url: str, trust: ssl.SSLContext, engine: FakeEngine, book: Connections
) -> None:
    body = json.dumps({"prompt": "Hi", "stream": True, "max_tokens": 150, "n": 64}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    raw.connect(("127.0.0.1", int(url.rpartition(":")[2])))
    with trust.wrap_socket(raw, server_hostname="127.0.0.1") as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        assert wait_for(lambda: engine.generations)
        assert wait_for(lambda: engine.live == 0)
        assert wait_for(lambda: book.num_open == 0)
    assert book.ended["write_timeout"] == 1
    assert engine.generations[0].given < 64 * 150
