"""The few fields of sentencepiece's ModelProto that are read or written here, without protobuf.

Field numbers are those of sentencepiece_model.proto: ModelProto {1 pieces, 2 trainer_spec,
3 normalizer_spec}, SentencePiece {1 piece, 2 score, 3 type}.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping
from enum import IntEnum
from typing import NamedTuple

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_BPE = 2  # TrainerSpec.ModelType


class PieceType(IntEnum):
    """The same numbers as GGUF's tokenizer.ggml.token_type."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class Piece(NamedTuple):
    text: str
    score: float
    type: int


def respelled(proto: bytes, names: Mapping[str, str]) -> bytes:
    """The model with some pieces under other names."""
    out = bytearray()
    for number, kind, value in _fields(proto):
        if number == 1 and kind == _BYTES and (name := names.get(_piece_text(value))) is not None:
            rest = b"".join(_field(*field) for field in _fields(value) if field[0] != 1)
            value = _field(1, _BYTES, name.encode()) + rest
        out += _field(number, kind, value)
    return bytes(out)


def bpe_model(pieces: Iterable[Piece], *, add_prefix_space: bool, collapse_spaces: bool) -> bytes:
    """A BPE model with byte fallback and no normalization but for spaces, from its pieces."""
    out = bytearray()
    size = 0
    for text, score, kind in pieces:
        body = _field(1, _BYTES, text.encode()) + _field(2, _FIXED32, struct.pack("<f", score))
        out += _field(1, _BYTES, body + _field(3, _VARINT, _varint(kind)))
        size += 1
    trainer = ((3, _BPE), (4, size), (35, 1))  # model_type, vocab_size, byte_fallback
    out += _field(2, _BYTES, b"".join(_field(n, _VARINT, _varint(v)) for n, v in trainer))
    spaces = ((3, add_prefix_space), (4, collapse_spaces), (5, True))
    normalizer = _field(1, _BYTES, b"identity")
    normalizer += b"".join(_field(n, _VARINT, _varint(int(v))) for n, v in spaces)
    out += _field(3, _BYTES, normalizer)
    return bytes(out)


def user_defined(proto: bytes) -> Iterator[tuple[int, str]]:
    """The numbers and texts of the user-defined symbols."""
    if _field(3, _VARINT, _varint(PieceType.USER_DEFINED)) not in proto:
        return  # reading every piece takes a tenth of a second: not for nothing
    pieces = (value for number, kind, value in _fields(proto) if number == 1 and kind == _BYTES)
    for number, body in enumerate(pieces):
        fields = {field: value for field, _, value in _fields(body)}
        if fields.get(3) == _varint(PieceType.USER_DEFINED):
            yield number, fields[1].decode()


def adds_prefix_space(proto: bytes) -> bool:
    """NormalizerSpec.add_dummy_prefix, which is on unless the model says otherwise."""
    for number, kind, value in _fields(proto):
        if number == 3 and kind == _BYTES:
            stated = [v for n, k, v in _fields(value) if n == 3 and k == _VARINT]
            return not stated or stated[-1] != b"\x00"
    return True


def without_prefix_space(proto: bytes) -> bytes:
    """The model with add_dummy_prefix off."""
    out = bytearray()
    for number, kind, value in _fields(proto):
        if number == 3 and kind == _BYTES:
            value += _field(3, _VARINT, b"\x00")
        out += _field(number, kind, value)
    return bytes(out)


def _piece_text(body: bytes) -> str:
    return next((value.decode() for number, _, value in _fields(body) if number == 1), "")


def _fields(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Number, wire type and raw value of each field; raises ValueError for what is no protobuf."""
    at = 0
    while at < len(data):
        key, at = _read_varint(data, at)
        kind = key & 7
        if kind == _VARINT:
            _, end = _read_varint(data, at)
        elif kind == _BYTES:
            size, at = _read_varint(data, at)
            end = at + size
        elif kind in (_FIXED32, _FIXED64):
            end = at + (4 if kind == _FIXED32 else 8)
        else:
            raise ValueError("not a sentencepiece model")
        if end > len(data):
            raise ValueError("the sentencepiece model is cut off")
        yield key >> 3, kind, data[at:end]
        at = end


def _field(number: int, kind: int, value: bytes) -> bytes:
    size = _varint(len(value)) if kind == _BYTES else b""
    return _varint(number << 3 | kind) + size + value


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(data) and shift < 64:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
        shift += 7
    raise ValueError("the sentencepiece model is cut off")


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
