"""One streamed completion over plain asyncio streams, and when each of its pieces came.

Speaks HTTP/1.1 itself: beside a server on two cores a general client would be what is measured.
"""

from __future__ import annotations

import asyncio
import itertools
import ssl
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import msgspec

from service.bench.events import END, EventLines, message_of, read_event
from service.bench.problem import BenchProblem

PIECE = 1 << 16
PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
REFUSED = "refused"  # 429: the server's own choice, counted apart from what went wrong


class Broken(Exception):
    """The other end does not speak as it should; the text says what came."""


@dataclass(frozen=True)
class Target:
    """Where requests go. ``url`` is the server's root, with or without ``/v1``."""

    url: str
    api_key: str = field(default="", repr=False)
    timeout: float = 600.0  # seconds for a whole answer

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise BenchProblem(f"{self.url!r} is no address of a server: http://127.0.0.1:8000")

    @property
    def root(self) -> str:
        return self.url.rstrip("/").removesuffix("/v1")

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        parts = urlsplit(self.url)
        is_https = parts.scheme == "https"
        context = ssl.create_default_context() if is_https else None
        port = parts.port or (443 if is_https else 80)
        return await asyncio.open_connection(parts.hostname, port, ssl=context)

    def head(self, method: str, path: str, length: int = 0) -> bytes:
        parts = urlsplit(self.root)
        lines = [f"{method} {parts.path}{path} HTTP/1.1", f"Host: {parts.netloc}"]
        lines += ["Connection: close", "Content-Type: application/json"]
        lines += [f"Content-Length: {length}"]
        lines += [f"Authorization: Bearer {self.api_key}"] if self.api_key else []
        return ("\r\n".join(lines) + "\r\n\r\n").encode()


@dataclass
class Trace:
    """Times of one request, seconds on the monotonic clock; counts as the server gave them."""

    start: float
    chunks: list[float] = field(default_factory=list)  # when each piece of text came
    end: float = 0.0
    tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    failure: str = ""  # its kind: refused, timeout, connection, http 500...
    detail: str = ""

    @property
    def is_good(self) -> bool:
        return not self.failure

    @property
    def first_token(self) -> float:
        return self.chunks[0] - self.start

    @property
    def gaps(self) -> list[float]:
        return [b - a for a, b in itertools.pairwise(self.chunks)]

    def fail(self, kind: str, detail: object = "") -> None:
        self.failure, self.detail = kind, str(detail)


async def stream(
    target: Target, path: str, body: dict[str, Any], start: float | None = None
) -> Trace:
    """Ask for one completion and note when its text came. Never raises: failures are noted too.

    ``start`` is when the request was due, where that is not now.
    """
    trace = Trace(time.monotonic() if start is None else start)
    try:
        async with asyncio.timeout(target.timeout):
            await _exchange(target, path, msgspec.json.encode(body), trace)
    except TimeoutError:
        trace.fail("timeout", f"no whole answer in {target.timeout:.0f} s")
    except Broken as error:
        trace.fail("broken answer", error)
    except (EOFError, OSError) as error:
        kind = "broken connection" if trace.chunks else "connection"
        trace.fail(kind, f"{type(error).__name__}: {error}")
    trace.end = time.monotonic()
    return trace


async def fetch(
    target: Target, path: str, body: dict[str, Any] | None = None
) -> tuple[int, dict[str, str], bytes]:
    """(status, headers, body) of a whole answer; with a ``body`` it is posted.

    Raises ``OSError`` (a timeout is one), ``EOFError``, ``Broken``.
    """
    payload = msgspec.json.encode(body) if body is not None else b""
    async with asyncio.timeout(target.timeout):
        reader, writer = await target.connect()
        try:
            method = "GET" if body is None else "POST"
            writer.write(target.head(method, path, len(payload)) + payload)
            status, headers = await _read_head(reader)
            answer = b"".join([piece async for piece in _pieces(reader, headers)])
        finally:
            writer.close()
    return status, headers, answer


async def _exchange(target: Target, path: str, payload: bytes, trace: Trace) -> None:
    reader, writer = await target.connect()
    try:
        writer.write(target.head("POST", path, len(payload)) + payload)
        status, headers = await _read_head(reader)
        pieces = _pieces(reader, headers)
        if status == 200:
            await _read_events(pieces, trace)
        else:
            body = b"".join([piece async for piece in pieces])
            trace.fail(REFUSED if status == 429 else f"http {status}", message_of(body))
    finally:
        writer.close()


async def _read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    words = (await reader.readline()).decode(errors="replace").split(maxsplit=2)
    if len(words) < 2 or not words[0].startswith("HTTP/") or not words[1].isdigit():
        raise Broken(f"no HTTP answer: {' '.join(words)[:100]!r}")
    headers: dict[str, str] = {}
    while line := (await reader.readline()).strip():
        name, _, value = line.decode(errors="replace").partition(":")
        headers[name.strip().lower()] = value.strip()
    return int(words[1]), headers


async def _pieces(reader: asyncio.StreamReader, headers: dict[str, str]) -> AsyncIterator[bytes]:
    """The body as it comes: by chunks, by its length, or until the server hangs up."""
    if headers.get("transfer-encoding", "").lower() == "chunked":
        while size := _chunk_size(await reader.readline()):
            yield (await reader.readexactly(size + 2))[:-2]
        return
    left = int(headers["content-length"]) if "content-length" in headers else None
    while left is None or left > 0:
        piece = await reader.read(PIECE)
        if not piece:
            if left:
                raise EOFError(f"the answer ended {left} bytes early")
            return
        left = None if left is None else left - len(piece)
        yield piece


def _chunk_size(line: bytes) -> int:
    if not line:
        raise EOFError("the answer ended in its middle")
    try:
        return int(line.split(b";")[0], 16)
    except ValueError:
        raise Broken(f"no chunk size: {line[:40]!r}") from None


async def _read_events(pieces: AsyncIterator[bytes], trace: Trace) -> None:
    """Up to ``[DONE]``; a server that never says it must have given a finish reason."""
    lines, is_finished, now = EventLines(), False, 0.0
    async for piece in pieces:
        now = time.monotonic()
        for data in lines.push(piece):
            if data == END:
                is_finished = True
                continue
            is_finished = _take(data, now, trace) or is_finished
            if trace.failure:
                return
    if not is_finished:
        trace.fail("broken answer", "the stream ended without [DONE] or a finish reason")
        return
    trace.tokens = trace.tokens or len(trace.chunks)  # no usage: a piece is taken for a token
    if not trace.tokens:
        trace.fail("empty answer", "not one token came")
    elif not trace.chunks:
        trace.chunks.append(now)  # half a character is a token without a text


def _take(data: bytes, now: float, trace: Trace) -> bool:
    """Note what an event brings; whether it ends the answer."""
    try:
        event = read_event(data)
    except msgspec.DecodeError as error:
        raise Broken(f"{error}: {data[:100]!r}") from None
    if failure := event.failure:
        trace.fail("error event", failure)
        return False
    if event.has_text:
        trace.chunks.append(now)
    if event.usage is not None:
        trace.tokens = event.usage.completion_tokens
        trace.prompt_tokens = event.usage.prompt_tokens
        trace.cached_tokens = event.usage.cached_tokens
    return event.is_last
