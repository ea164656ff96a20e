"""An answer on its way out, as server-sent events or whole; a client that hangs up ends it."""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Callable, Coroutine, Mapping
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, Protocol

import msgspec
from msgspec import UNSET, Struct, UnsetType
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service.api.best_of import choose
from service.api.errors import envelope, internal_error
from service.api.exchange import Exchange
from service.api.generation import Answer, generate
from service.api.meter import Meter
from service.api.rate_limits import spending
from service.api.schemas.answers import Usage
from service.api.submission import Job
from service.api.text import Event
from service.errors import EngineLost, PronkError
from service.metrics import Metrics

logger = logging.getLogger("pronk.api")

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"
STREAM_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache, no-store",
    "X-Accel-Buffering": "no",  # nginx would keep the whole answer back
}


class Shape(Protocol):
    """How one endpoint writes events; completions and chat are two of them."""

    def chunks(self, event: Event, usage: Usage | UnsetType | None) -> list[Struct]:
        """The chunks of one event, none where it shows nothing."""

    def last_chunks(self, usage: Usage) -> list[Struct]:
        """What carries the usage of a whole stream, after everything else."""

    def whole(self, events: list[Event], usage: Usage) -> Struct: ...

    def account(self, meter: Meter) -> None:
        """Adds what only it knows by now: its id, reasoning tokens, choices that ended in calls."""


class StreamUsage(Struct, frozen=True):
    """Which chunks carry usage: none, the last (null before), or every one."""

    at_end: bool = False
    always: bool = False


encoder = msgspec.json.Encoder()


def frame(chunk: Struct) -> bytes:
    return b"data: %b\n\n" % encoder.encode(chunk)


def named_frame(chunk: Struct) -> bytes:
    """With an ``event:`` line: the tag that is the chunk's ``type``."""
    name = str(chunk.__struct_config__.tag).encode()
    return b"event: %b\ndata: %b\n\n" % (name, encoder.encode(chunk))


def _enveloped(error: PronkError) -> list[Struct]:
    return [envelope(error)]


@dataclass(frozen=True, slots=True)
class Framing:
    """How chunks become a stream, and what stands where nothing else does. The default is that of
    OpenAI's completions and chat."""

    frame: Callable[[Struct], bytes] = frame
    failure: Callable[[PronkError], list[Struct]] = _enveloped  # what ends a stream that fails
    ping: bytes = PING
    end: bytes = DONE


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
        framing: Framing | None = None,
    ) -> None:
        self.job = job
        self.shape = shape
        self.metrics = metrics
        self.exchange = exchange
        self.stream = stream
        self.ping_interval = ping_interval
        self.extra_headers = headers
        exchange.meter.is_stream = stream is not None
        self.framing = framing or Framing()
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        server = scope["app"].state.server
        taken = functools.partial(server.gate.leave, self.exchange)
        if self.stream is None:
            work = self._whole(scope, receive, send, taken)
        else:
            work = self._stream(send, taken)
        with server.answering():
            try:
                if not await until_hangup(work, receive):
                    self.exchange.outcome = "cancelled"
            finally:
                self.shape.account(self.exchange.meter)

    async def _whole(
        self, scope: Scope, receive: Receive, send: Send, taken: Callable[[], None]
    ) -> None:
        with spending(self.exchange, self.job):
            try:
                answer, events = await self._joined(self.job, taken)
            except EngineLost:  # nothing of it has left for the client
                answer, events = await self._joined(replace(self.job, is_retry=True), taken)
        usage = answer.usage(sum(event.num_tokens for event in events))
        events = choose(self.job, events)
        body = msgspec.json.encode(self.shape.whole(events, usage))
        response = Response(body, headers=self.extra_headers, media_type="application/json")
        await response(scope, receive, send)
        self.exchange.meter.num_told = usage.completion_tokens

    async def _joined(self, job: Job, taken: Callable[[], None]) -> tuple[Answer, list[Event]]:
        async with generate(job, self.metrics) as answer:
            taken()
            try:
                return answer, await answer.joined()
            except EngineLost:
                answer.abandon()
                raise

    async def _stream(self, send: Send, taken: Callable[[], None]) -> None:
        wire = Wire(send, {**STREAM_HEADERS, **self.extra_headers}, self.framing)
        with spending(self.exchange, self.job):
            async with generate(self.job, self.metrics) as answer:
                taken()
                await self._write_answer(wire, answer)
        await wire.end()

    async def _write_answer(self, wire: Wire, answer: Answer) -> None:
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
                    await wire.write(self._frames(chunks))
                self.exchange.meter.num_told = generated
        if self.stream.at_end:
            await wire.write(self._frames(self.shape.last_chunks(answer.usage(generated))))

    def _frames(self, chunks: list[Struct]) -> bytes:
        return b"".join(map(self.framing.frame, chunks))

    def _failure(self, error: Exception) -> bytes:
        """What ends a stream that cannot go on; the status has been sent already."""
        self.exchange.outcome = "failed"
        if not isinstance(error, PronkError):
            about = {"request_id": self.exchange.request_id}
            logger.error("the request failed", exc_info=error, extra=about)
            error = internal_error()
        self.exchange.meter.code = error.code or ""
        return self._frames(self.framing.failure(error))


class Wire:
    """A response whose headers leave with its first bytes; one writer at a time."""

    def __init__(self, send: Send, headers: Mapping[str, str], framing: Framing) -> None:
        self.has_started = False
        self._send = send
        self._framing = framing
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
        if self._framing.end:
            await self.write(self._framing.end)
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def keep_alive(self, interval: float) -> None:
        """A ping whenever nothing else was said for so long: proxies cut silent streams."""
        while True:
            silence = time.monotonic() - self._last_write
            if silence >= interval:
                await self.write(self._framing.ping)
            else:
                await asyncio.sleep(interval - silence)


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
