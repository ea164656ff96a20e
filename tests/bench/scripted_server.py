"""A server of a dozen lines that says, byte for byte, what a test tells it to."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

Talk = Callable[["Call"], Awaitable[None]]


@dataclass
class Call:
    """One request as it came, and the way to answer it."""

    path: str
    headers: dict[str, str]
    body: Any
    writer: asyncio.StreamWriter

    async def say(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def begin(self, status: str = "200 OK", kind: str = "text/event-stream") -> None:
        head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nTransfer-Encoding: chunked\r\n\r\n"
        await self.say(head.encode())

    async def chunk(self, data: bytes) -> None:
        await self.say(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    async def event(self, value: object) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        await self.chunk(b"data: " + data + b"\n\n")

    async def end(self) -> None:
        await self.say(b"0\r\n\r\n")

    async def whole(self, status: str, value: object) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        head = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n"
        await self.say(head.encode() + body)


@dataclass
class Scripted:
    url: str = ""
    calls: list[Call] = field(default_factory=list)
    live: int = 0
    most_live: int = 0


@asynccontextmanager
async def answering(talk: Talk) -> AsyncIterator[Scripted]:
    """``talk`` is called for every POST; a GET gets one model."""
    seen = Scripted()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        method, path, _ = (await reader.readline()).decode().split()
        headers = {}
        while line := (await reader.readline()).decode().strip():
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        raw = await reader.readexactly(int(headers.get("content-length", 0)))
        call = Call(path, headers, json.loads(raw) if raw else None, writer)
        seen.live += method == "POST"
        seen.most_live = max(seen.most_live, seen.live)
        try:
            if method == "GET":
                found = {"data": [{"id": "scripted"}]} if path == "/v1/models" else {}
                await call.whole("200 OK", found)
            else:
                seen.calls.append(call)
                await talk(call)
        except ConnectionError:
            pass  # the client has gone
        finally:
            seen.live -= method == "POST"
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        seen.url = f"http://127.0.0.1:{port}"
        yield seen


def text(piece: str, finish: str | None = None) -> dict[str, object]:
    return {"choices": [{"text": piece, "finish_reason": finish}]}


def usage(tokens: int, prompt: int = 5, cached: int = 0) -> dict[str, object]:
    details = {"cached_tokens": cached}
    counts = {"prompt_tokens": prompt, "completion_tokens": tokens}
    return {"choices": [], "usage": {**counts, "prompt_tokens_details": details}}


async def answer(call: Call) -> None:
    """As many pieces as tokens were asked for, usage, the end. A word of text is three tokens."""
    if not call.body["stream"]:
        prompt = call.body["prompt"]
        count = 3 * len(prompt.split()) if isinstance(prompt, str) else len(prompt)
        await call.whole("200 OK", text("a", "length") | {"usage": usage(1, count)["usage"]})
        return
    await call.begin()
    for _ in range(call.body["max_tokens"]):
        await call.event(text("a"))
        await asyncio.sleep(0)
    await call.event(text("", "length"))
    await call.event(usage(call.body["max_tokens"]))
    await call.event(b"[DONE]")
    await call.end()
