"""The HTTP process's end of the seam: one connection to the engine, on the event loop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from service.engine.framing import BrokenFrame, FrameReader, encode_frame
from service.engine.messages import FromEngine, ToEngine

logger = logging.getLogger("pronk.engine")


class Link(asyncio.Protocol):
    """Bytes in, messages out to ``receive``; ``closed`` resolves when the connection has ended."""

    def __init__(self, receive: Callable[[FromEngine], None]) -> None:
        self._receive = receive
        self._reader: FrameReader[FromEngine] = FrameReader(FromEngine)
        self._transport: asyncio.Transport | None = None
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # uvloop's is no asyncio.Transport

    def data_received(self, data: bytes) -> None:
        try:
            for message in self._reader.feed(data):
                self._receive(message)
        except BrokenFrame as error:
            logger.error("the engine sent what cannot be read: %s", error)
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.closed.done():
            self.closed.set_result(None)

    def send(self, message: ToEngine) -> None:
        assert self._transport is not None
        if not self._transport.is_closing():
            self._transport.write(encode_frame(message))

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


async def connect(path: str, receive: Callable[[FromEngine], None]) -> Link | None:
    """A link to the engine listening on ``path``; None while nobody does."""
    loop = asyncio.get_running_loop()
    try:
        _, link = await loop.create_unix_connection(lambda: Link(receive), path)
    except (FileNotFoundError, ConnectionError):
        return None
    return link
