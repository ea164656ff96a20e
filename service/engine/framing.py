"""Length-prefixed msgpack: a 4-byte little-endian length, then one tagged struct.

The bytes never leave the machine (a Unix socket in a folder only its owner may enter), yet nothing
is trusted more than msgspec's typed decoding allows: no pickle, and a length past the bound ends
the connection instead of filling memory.
"""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import msgspec

LENGTH_BYTES = 4
MAX_FRAME = 256 << 20  # prompt logprobs of a 128k prompt, 20 alternatives a token, stay below it

Message = TypeVar("Message")
_encoder = msgspec.msgpack.Encoder()


class BrokenFrame(ValueError):
    """The peer does not speak this protocol: the connection is of no further use."""


def encode_frame(message: msgspec.Struct) -> bytes:
    frame = bytearray(LENGTH_BYTES)
    _encoder.encode_into(message, frame, LENGTH_BYTES)
    length = len(frame) - LENGTH_BYTES
    assert length <= MAX_FRAME, "a message past the frame bound"
    frame[:LENGTH_BYTES] = length.to_bytes(LENGTH_BYTES, "little")
    return bytes(frame)


class FrameReader(Generic[Message]):
    """Turns received bytes, cut anywhere, into whole messages of ``kinds`` (a union of structs)."""

    def __init__(self, kinds: Any) -> None:
        self._decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(kinds)
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Message]:
        """Every message completed by ``data``, in order. Raises ``BrokenFrame``."""
        self._buffer += data
        messages: list[Message] = []
        start, buffer = 0, self._buffer
        while len(buffer) - start >= LENGTH_BYTES:
            length = int.from_bytes(buffer[start : start + LENGTH_BYTES], "little")
            if length > MAX_FRAME:
                raise BrokenFrame(f"a frame of {length} bytes, at most {MAX_FRAME} are allowed")
            end = start + LENGTH_BYTES + length
            if len(buffer) < end:
                break
            messages.append(self._decode(bytes(buffer[start + LENGTH_BYTES : end])))
            start = end
        del buffer[:start]
        return messages

    def _decode(self, body: bytes) -> Message:
        try:
            return self._decoder.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise BrokenFrame(str(error)) from None
