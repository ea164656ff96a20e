"""HTTP/1.1 as pronk reads it: h11 without its leniencies.

Whatever two readers of one stream may understand differently is how requests are smuggled past the
first of them (a proxy that checks keys, say), so it is refused: line ends that are no CRLF, folded
headers, a length said twice or beside an encoding, versions that are none of ours.
"""

from __future__ import annotations

import re
from typing import Any

import h11

from service.errors import HeadersTooLarge, InvalidRequest

MAX_HEAD_BYTES = 64 * 1024
MAX_FIELDS = 128  # headers of one request
NUM_FREE_CHUNKS = 1024  # of a chunked body, however small they are
SMALLEST_CHUNK = 64  # bytes a chunk must have on average beyond those: each costs a turn of h11
END = b"\r\n\r\n"
LENIENT = re.compile(rb"(?<!\r)\n|\r(?=[^\n])|\n[ \t]|\0")
LENGTH = re.compile(rb"[0-9]{1,15}")
VERSIONS = (b" HTTP/1.1", b" HTTP/1.0")


class StrictConnection(h11.Connection):
    """A server's side of one connection. ``refusal`` says why it raised ``RemoteProtocolError``."""

    def __init__(self) -> None:
        super().__init__(h11.SERVER, MAX_HEAD_BYTES)
        self.refusal: InvalidRequest = InvalidRequest("This is no valid HTTP request.")
        self._num_chunks = 0
        self._num_bytes = 0

    @property
    def has_begun_a_head(self) -> bool:
        return bool(self.trailing_data[0])

    def next_event(self) -> Any:
        try:
            if self.their_state is h11.IDLE:
                self._check(self.trailing_data[0])
            event = super().next_event()
            if isinstance(event, h11.Data):
                self._count(event)
        except h11.RemoteProtocolError as error:
            if error.error_status_hint == 431:
                self.refusal = HeadersTooLarge(
                    f"The headers are longer than {MAX_HEAD_BYTES} bytes or more than {MAX_FIELDS}."
                )
            raise
        return event

    def _check(self, received: bytes) -> None:
        """Look at a head that is whole, or at what there is of one, before h11 does."""
        end = received.find(END)
        head = received if end < 0 else received[:end]
        if len(head) > MAX_HEAD_BYTES:
            raise h11.RemoteProtocolError("a head too long", error_status_hint=431)
        if LENIENT.search(head):
            self._refuse("Lines must end in CRLF, and headers must not be folded.")
        if end >= 0:
            self._num_chunks = self._num_bytes = 0
            self._check_fields(head)

    def _check_fields(self, head: bytes) -> None:
        request, *lines = head.split(b"\r\n")
        if len(lines) > MAX_FIELDS:
            raise h11.RemoteProtocolError("too many headers", error_status_hint=431)
        if not request.endswith(VERSIONS):
            self._refuse("This server speaks HTTP/1.1 (and 1.0), no other version.")
        fields = [line.partition(b":") for line in lines]
        lengths = [value for name, _, value in fields if name.lower() == b"content-length"]
        encoded = any(name.lower() == b"transfer-encoding" for name, _, _ in fields)
        if len(lengths) > 1 or any(not LENGTH.fullmatch(value.strip()) for value in lengths):
            self._refuse("Content-Length must be one number, said once.")
        if encoded and (lengths or request.endswith(b"1.0")):
            self._refuse("Transfer-Encoding does not go with Content-Length or HTTP/1.0.")

    def _count(self, data: h11.Data) -> None:
        self._num_chunks += data.chunk_end  # h11 loses starts between two pieces
        self._num_bytes += len(data.data)
        excess = self._num_chunks - NUM_FREE_CHUNKS
        if excess > 0 and self._num_bytes < excess * SMALLEST_CHUNK:
            self._refuse(f"Too many chunks: send {SMALLEST_CHUNK} bytes or more in each.")

    def _refuse(self, why: str) -> None:
        self.refusal = InvalidRequest(f"This is no valid HTTP request: {why}")
        raise h11.RemoteProtocolError(why)
