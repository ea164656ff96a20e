"""HTTP/1.1 on one connection: uvicorn's h11 protocol with what it leaves open.

uvicorn waits for ever for a request's head, and answers bytes that are no HTTP in plain text.
"""

from __future__ import annotations

import asyncio

import h11
import msgspec
from uvicorn.protocols.http.h11_impl import H11Protocol

from service.api.errors import envelope
from service.errors import InvalidRequest

BAD_REQUEST = [
    (b"content-type", b"application/json"),
    (b"connection", b"close"),
]


class HttpProtocol(H11Protocol):
    """A head must be whole within ``head_timeout`` seconds of the connection or its first byte.

    Between two requests uvicorn's keep-alive timeout holds.
    """

    head_timeout = 30.0
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._deadline = self.loop.call_later(self.head_timeout, self._give_up)

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._disarm()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(self.head_timeout, self._give_up)

    def _disarm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _give_up(self) -> None:
        self._deadline = None
        self.transport.close()

    def _unsupported_upgrade_warning(self) -> None:
        """Silence: some clients offer HTTP/2 with every request, and strangers anything."""

    def send_400_response(self, msg: str) -> None:
        """The one error envelope, for what never became a request."""
        body = msgspec.json.encode(envelope(InvalidRequest("This is not a valid HTTP request.")))
        head = [*BAD_REQUEST, (b"content-length", str(len(body)).encode())]
        for event in (
            h11.Response(status_code=400, headers=head, reason=b"Bad Request"),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
