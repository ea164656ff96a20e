"""An answer on its way out, as server-sent events or whole; a client that hangs up ends it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine, Mapping
from contextlib import aclosing
from typing import Any, Protocol

import msgspec
from msgspec import UNSET, Struct, UnsetType
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service.api.best_of import choose
from service.api.errors import envelope, internal_error
from service.api.exchange import Exchange
from service.api.generation import Answer, generate
from service.api.schemas.answers import Usage
from service.api.submission import Job
from service.api.text import Event
from service.errors import PronkError
from service.metrics import Metrics

logger = logging.getLogger("pronk.api")

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"
STREAM_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # nginx would keep the whole answer back
}


class Shape(Protocol):
    """How one endpoint writes events; completions and chat are two of them."""

    def chunks(self, event: Event, usage: Usage | UnsetType | None) -> list[Struct]:
        """The chunks of one event, none where it shows nothing."""

    def last_chunk(self, usage: Usage) -> Struct:
        """The chunk without choices that carries the usage."""

    def whole(self, events: list[Event], usage: Usage) -> Struct: ...


class StreamUsage(Struct, frozen=True):
    """Which chunks carry usage: none, the last (null before), or every one."""

    at_end: bool = False
    always: bool = False


class AnswerResponse(Response):
    """Submits the job when it is called, so that the whole life of a generation is one ``with``.

    Refusals are raised before anything is sent, and become a status.
    """

    def __init__(
        self,
        job: Job,
        shape: Shape,
        *,
        metrics: Metrics,
        exchange: Exchange,
        stream: StreamUsage | None,
        ping_interval: float,
        headers: Mapping[str, str],
    ) -> None:
        self.job = job
        self.shape = shape
        self.metrics = metrics
        self.exchange = exchange
        self.stream = stream
        self.ping_interval = ping_interval
        self.extra_headers = headers
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = self._whole(scope, receive, send) if self.stream is None else self._stream(send)
        if not await until_hangup(work, receive):
            self.exchange.outcome = "cancelled"

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with generate(self.job, self.metrics) as answer:
            events = await answer.joined()
        usage = answer.usage(sum(event.num_tokens for event in events))
        events = choose(self.job, events)
        body = msgspec.json.encode(self.shape.whole(events, usage))
        response = Response(body, headers=self.extra_headers, media_type="application/json")
        await response(scope, receive, send)

    async def _stream(self, send: Send) -> None:
        wire = Wire(send, {**STREAM_HEADERS, **self.extra_headers})
        async with generate(self.job, self.metrics) as answer:
            pings = asyncio.create_task(wire.keep_alive(self.ping_interval))
            try:
                await self._write_events(wire, answer)
            except Exception as error:
                if not wire.has_started:
                    raise
                answer.close("error")
                await wire.write(self._failure(error))
            finally:
                pings.cancel()
                await asyncio.gather(pings, return_exceptions=True)
        await wire.end()

    async def _write_events(self, wire: Wire, answer: Answer) -> None:
        assert self.stream is not None
        usage: Usage | UnsetType | None = None if self.stream.at_end else UNSET
        generated = 0
        async with aclosing(answer.events()) as events:
            async for event in events:
                generated += event.num_tokens
                if self.stream.always:
                    usage = answer.usage(generated)
                if chunks := self.shape.chunks(event, usage):
                    await wire.write(b"".join(map(frame, chunks)))
        if self.stream.at_end:
            await wire.write(frame(self.shape.last_chunk(answer.usage(generated))))

    def _failure(self, error: Exception) -> bytes:
        """The terminal event of a stream that cannot go on; the status has been sent already."""
        self.exchange.outcome = "failed"
        if not isinstance(error, PronkError):
            logger.error("request %s failed", self.exchange.request_id, exc_info=error)
            error = internal_error()
        return frame(envelope(error))


class Wire:
    """A response whose headers leave with its first bytes; one writer at a time."""

    def __init__(self, send: Send, headers: Mapping[str, str]) -> None:
        self.has_started = False
        self._send = send
        self._headers = [
            (name.lower().encode("latin-1"), value.encode("latin-1"))
            for name, value in headers.items()
        ]
        self._lock = asyncio.Lock()
        self._last_write = time.monotonic()

    async def write(self, data: bytes) -> None:
        """Waits while the client reads slowly; the engine does not wait with it."""
        async with self._lock:
            if not self.has_started:
                self.has_started = True
                start = {"type": "http.response.start", "status": 200, "headers": self._headers}
                await self._send(start)
            await self._send({"type": "http.response.body", "body": data, "more_body": True})
            self._last_write = time.monotonic()

    async def end(self) -> None:
        await self.write(DONE)
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def keep_alive(self, interval: float) -> None:
        """A comment whenever nothing else was said for so long: proxies cut silent streams."""
        while True:
            silence = time.monotonic() - self._last_write
            if silence >= interval:
                await self.write(PING)
            else:
                await asyncio.sleep(interval - silence)


encoder = msgspec.json.Encoder()


def frame(chunk: Struct) -> bytes:
    return b"data: %b\n\n" % encoder.encode(chunk)


async def until_hangup(work: Coroutine[Any, Any, None], receive: Receive) -> bool:
    """Run ``work`` to its end, or until the client is gone; False when it was the client."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_hangup(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            return False
        task.result()
        return True
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _hangup(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
