"""One request over a plain socket and what became of it: light enough to flood a server beside it.

Connections are kept and used again, as clients and balancers do.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import msgspec

from service.bench.events import END, EventLines

Reader = asyncio.StreamReader
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass
class Answer:
    """``ending``: done, refused, cut, error event, no connection, http STATUS."""

    due: float
    status: int = 0
    ending: str = "cut"
    retry_after: int | None = None
    first: float | None = None  # seconds from when it was due to the first piece
    seconds: float = 0.0
    tokens: int = 0
    text: bytes = b""  # of what was no success, or of a whole answer

    @property
    def is_done(self) -> bool:
        return self.ending == "done"


class Usage(msgspec.Struct):
    completion_tokens: int = 0


class Told(msgspec.Struct):
    """What a stream's event or a whole answer says that matters here."""

    usage: Usage | None = None
    error: Any = None


decoder = msgspec.json.Decoder(Told)


@dataclass
class Client:
    """Requests to one server; ``reuse`` keeps connections open between them."""

    url: str
    reuse: bool = True
    idle: list[Connection] = field(default_factory=list)

    async def post(
        self, path: str, body: dict[str, Any], due: float | None = None, hurry: float | None = None
    ) -> Answer:
        """Never raises for what a server or network does. Hangs up after ``hurry`` seconds."""
        answer = Answer(time.monotonic() if due is None else due)
        try:
            async with asyncio.timeout(hurry):
                await self._exchange(path, msgspec.json.encode(body), answer)
        except TimeoutError:
            answer.ending = "left"
        except (OSError, EOFError, ValueError) as error:
            answer.ending = "cut" if answer.status else "no answer"
            answer.text = f"{type(error).__name__}: {error}".encode()
        answer.seconds = time.monotonic() - answer.due
        return answer

    async def close(self) -> None:
        while self.idle:
            self.idle.pop()[1].close()

    async def _exchange(self, path: str, payload: bytes, answer: Answer) -> None:
        reader, writer = connection = await self._connect()
        may_reuse = False
        try:
            writer.write(self._head(path, len(payload)) + payload)
            headers = await read_head(reader, answer)
            pieces = read_pieces(reader, headers)
            if headers.get(b"content-type", b"").startswith(b"text/event-stream"):
                await _read_stream(pieces, answer)
            else:
                await _read_whole(pieces, answer)
            may_reuse = self.reuse and headers.get(b"connection") != b"close"
        finally:
            if may_reuse:
                self.idle.append(connection)
            else:
                writer.close()

    async def _connect(self) -> Connection:
        while self.idle:
            reader, writer = self.idle.pop()
            if not reader.at_eof() and not writer.is_closing():
                return reader, writer
            writer.close()
        parts = urlsplit(self.url)
        return await asyncio.open_connection(parts.hostname, parts.port)

    def _head(self, path: str, length: int) -> bytes:
        lines = [f"POST {path} HTTP/1.1", f"Host: {urlsplit(self.url).netloc}"]
        lines += ["Content-Type: application/json", f"Content-Length: {length}"]
        lines += [] if self.reuse else ["Connection: close"]
        return ("\r\n".join(lines) + "\r\n\r\n").encode()


async def read_head(reader: Reader, answer: Answer) -> dict[bytes, bytes]:
    """Its status line and headers; what ``answer`` keeps of them."""
    head = await reader.readuntil(b"\r\n\r\n")
    first, *lines = head.split(b"\r\n")
    answer.status = int(first.split(b" ")[1])
    pairs = (line.partition(b":") for line in lines if line)
    headers = {name.lower(): value.strip() for name, _, value in pairs}
    if b"retry-after" in headers:
        answer.retry_after = int(headers[b"retry-after"])
    return headers


async def read_pieces(reader: Reader, headers: dict[bytes, bytes]) -> AsyncIterator[bytes]:
    """The body to its proper end; ``EOFError`` where it was cut."""
    if b"content-length" in headers:
        yield await reader.readexactly(int(headers[b"content-length"]))
        return
    while size := int(await reader.readuntil(b"\r\n"), 16):
        yield (await reader.readexactly(size + 2))[:-2]
    await reader.readexactly(2)


async def _read_stream(pieces: AsyncIterator[bytes], answer: Answer) -> None:
    lines, is_done, failure = EventLines(), False, b""
    async for piece in pieces:
        if answer.first is None and not piece.startswith(b":"):
            answer.first = time.monotonic() - answer.due
        for data in lines.push(piece):
            if data == END:
                is_done = True
                continue
            told = decoder.decode(data)
            if told.error is not None:
                failure = data
            if told.usage is not None:
                answer.tokens = told.usage.completion_tokens
    answer.text = failure
    answer.ending = "error event" if failure else "done" if is_done else "cut"


async def _read_whole(pieces: AsyncIterator[bytes], answer: Answer) -> None:
    answer.text = b"".join([piece async for piece in pieces])
    if answer.status == 200:
        told = decoder.decode(answer.text)
        answer.tokens = told.usage.completion_tokens if told.usage is not None else 0
        answer.ending = "done"
    else:
        answer.ending = "refused" if answer.status in (429, 503, 529) else f"http {answer.status}"
