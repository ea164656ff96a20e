"""HTTP/1.1 on one connection: uvicorn's h11 protocol with what it leaves open.

uvicorn waits for ever for a request's head, for the rest of a body it has answered already and for
a reader that takes nothing, and answers bytes that are no HTTP in plain text.
"""

from __future__ import annotations

import asyncio
import fcntl
import sys
import termios
from collections.abc import Iterable
from typing import Any

import h11
import msgspec
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol
from uvicorn.server import ServerState

from service.api.errors import envelope
from service.api.exchange import OVER_LIMIT
from service.http.connections import Connections
from service.http.heads import StrictConnection

LINGER_BYTES = 64 << 20  # of a refused body, read and dropped: many clients send all, then read
REFUSED = [
    (b"content-type", b"application/json"),
    (b"cache-control", b"no-store"),
    (b"x-content-type-options", b"nosniff"),
    (b"connection", b"close"),
]


class Outlet(asyncio.Transport):
    """A transport that knows how many bytes the other side took."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._written = 0

    @property
    def pending(self) -> int:
        return self._transport.get_write_buffer_size()

    def taken(self) -> int:
        """Exact enough to see it move: under TLS what waits is longer than what was written."""
        socket = self._transport.get_extra_info("socket")
        queued = fcntl.ioctl(socket.fileno(), termios.TIOCOUTQ, bytes(4))
        return self._written - self.pending - int.from_bytes(queued, sys.byteorder)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self._written += len(data)
        self._transport.write(data)

    def writelines(self, list_of_data: Iterable[bytes | bytearray | memoryview]) -> None:
        self.write(b"".join(list_of_data))

    def close(self) -> None:
        self._transport.close()

    def abort(self) -> None:
        self._transport.abort()

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def pause_reading(self) -> None:
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        self._transport.resume_reading()

    def get_write_buffer_size(self) -> int:
        return self.pending

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._transport.get_extra_info(name, default)


class HttpProtocol(H11Protocol):
    """Each part of an exchange has a time limit (``Patience``), whatever drips in meanwhile.

    ``book`` knows all connections and which of them may be ended for others.
    """

    transport: Outlet  # None until the connection is made

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        book: Connections | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.conn = self.head = StrictConnection()
        self.book = book or Connections()
        self.handshake: asyncio.Task[None] | None = None  # until the connection is made
        self._is_extra = False
        self._is_made = False
        self._has_given_way = False
        self._stage = ""  # what the deadline is for; nothing while a request is being answered
        self._deadline: asyncio.TimerHandle | None = None
        self._num_dropped = 0
        self._taken = 0
        self._taken_at = 0.0

    # ---- what the transport tells

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.handshake = None
        if self._has_given_way:
            transport.abort()
            return
        self._is_made = True
        super().connection_made(Outlet(transport))
        self._is_extra = self.book.is_extra(self)
        if self._is_extra:
            self.app_state = {**self.app_state, OVER_LIMIT: True}
        self._settle()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        self.book.forget(self)
        if self._is_made:
            super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing() or self.conn.their_state is h11.MUST_CLOSE:
            return  # what follows a last request is nobody's, and must not cost it its answer
        if self._stage == "linger":
            self._num_dropped += len(data)
            if self._num_dropped > LINGER_BYTES:
                self._expire()
                return
        super().data_received(data)
        if self._is_extra and self.cycle is not None:
            self.cycle.keep_alive = False
        self._settle()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._settle()

    # ---- how long it may take

    def _settle(self) -> None:
        """Give what is waited for now its time limit, once."""
        stage = self._waits_for()
        if stage and stage == self._stage:
            return
        self._disarm()
        was, self._stage = self._stage, stage
        if stage in ("head", "linger"):
            patience = self.book.patience
            limit = patience.head if stage == "head" else patience.linger
            self._deadline = self.loop.call_later(limit, self._expire)
        if not stage:
            self.book.answer(self)
        elif not was:
            self.book.wait(self)

    def _waits_for(self) -> str:
        if self.transport.is_closing():
            return "end"
        state = self.conn.their_state
        if state is h11.IDLE:
            if self.cycle is None or self.head.has_begun_a_head:
                return "head"
            if self.timeout_keep_alive_task is None:  # uvicorn forgets it where a body came late
                self.timeout_keep_alive_task = self.loop.call_later(
                    self.timeout_keep_alive, self.timeout_keep_alive_handler
                )
            return "idle"
        is_answered = self.cycle is not None and self.cycle.response_complete
        return "linger" if state is h11.SEND_BODY and is_answered else ""

    def _disarm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _expire(self) -> None:
        self._disarm()
        self.book.ended[f"{self._stage}_timeout"] += 1
        self.transport.close()

    # ---- what the book asks

    @property
    def has_output(self) -> bool:
        return self._is_made and self.transport.pending > 0

    def is_stalled(self, now: float, patience: float) -> bool:
        taken = self.transport.taken() if self.has_output else -1
        if not self.has_output or taken != self._taken:
            self._taken, self._taken_at = taken, now
            return False
        return now - self._taken_at >= patience

    def give_way(self) -> None:
        self._has_given_way = True
        if self.handshake is not None:
            self.handshake.cancel()
        elif self.has_output:
            self.transport.close()
        else:
            self.transport.abort()  # TLS would wait for the other side's goodbye

    def abort(self) -> None:
        self.transport.abort()

    # ---- what uvicorn asks at the end

    def shutdown(self) -> None:
        if not self.transport.is_closing():
            super().shutdown()

    # ---- what is no request

    def _unsupported_upgrade_warning(self) -> None:
        """Silence: some clients offer HTTP/2 with every request, and strangers anything."""

    def send_400_response(self, msg: str) -> None:
        """The one error envelope for what is no request; a broken body ends its answer."""
        self.book.ended["malformed"] += 1
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            refusal = self.head.refusal
            body = msgspec.json.encode(envelope(refusal))
            head = [*REFUSED, (b"content-length", str(len(body)).encode())]
            reason = STATUS_PHRASES[refusal.status]
            answer = h11.Response(status_code=refusal.status, headers=head, reason=reason)
            self.transport.write(self.conn.send(answer) or b"")
            if not self._asked_for_no_body():
                self.transport.write(self.conn.send(h11.Data(data=body)) or b"")
            self.transport.write(self.conn.send(h11.EndOfMessage()) or b"")
        self.transport.close()

    def _asked_for_no_body(self) -> bool:
        """Whether the request whose body broke was a HEAD."""
        is_under_way = self.cycle is not None and not self.cycle.response_complete
        return is_under_way and self.cycle.scope["method"] == "HEAD"
