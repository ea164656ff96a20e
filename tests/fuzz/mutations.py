"""Damage to files, as a hostile hand would do it: in bytes, and where each format's structure is.

Every function takes a source of chance, so that hypothesis (or a fuzzer that is led by coverage)
chooses, and the same choices give the same damage.
"""

from __future__ import annotations

import copy
import io
import json
import struct
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from model.checkpoint.gguf_header import read_header

HUGE = (0, 1, 3, 127, 255, 1 << 15, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 40, 1 << 60)
HUGE_64 = (*HUGE, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
ODD_TEXTS = (
    *(
        "",
        "\0",
        "\n",
        "\x1b[2J",
        "/",
        "..",
        "../../etc/passwd",
        "/etc/passwd",
        "a" * 5000,
        "\ud800",
    ),
    *("▁", "<0x41>", "<0x4", "<s>", "{{ 1/0 }}", "{% for %}", "(?:a*)*b", "[[", "F32", "I64", "🦙"),
)
ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 0.5, -0.0, 1e308, float("nan"), float("inf"), 10**400),
    *([], {}, [[]], [None], {"": None}, [1, "a", None], {"a": {"b": []}}, ["x"] * 300),
    *HUGE_64,
    *ODD_TEXTS,
)


def damaged_bytes(chance: Random, data: bytes, places: int = 4) -> bytes:
    """Flipped, overwritten, cut, repeated or moved, at up to so many places."""
    out = bytearray(data)
    for _ in range(chance.randint(1, places)):
        at = chance.randrange(len(out) + 1)
        end = min(len(out), at + chance.choice((1, 1, 2, 4, 8, 64, 1000)))
        match chance.randrange(7):
            case 0 if at < len(out):
                out[at] ^= 1 << chance.randrange(8)
            case 1:
                out[at:end] = bytes([chance.choice((0, 0x7F, 0x80, 0xFF))]) * (end - at)
            case 2:
                number = chance.choice(HUGE_64)
                out[at : at + 8] = struct.pack("<Q", number)
            case 3:
                out[at : at + 4] = struct.pack("<I", chance.choice(HUGE) & 0xFFFFFFFF)
            case 4:
                del out[at:end]
            case 5:
                out[at:at] = bytes(out[at:end])
            case _:
                del out[at:]
    return bytes(out)


# --------------------------------------------------------------------------- JSON


def some_place(chance: Random, document: Any) -> tuple[Any, Any] | None:
    """Found by going down from the root: settings are as likely as a vocabulary's pieces."""
    found = None
    while isinstance(document, dict | list) and document:
        keys = list(document) if isinstance(document, dict) else range(len(document))
        key = chance.choice(keys)
        found, document = (document, key), document[key]
        if chance.randrange(3) == 0:
            break
    return found


def damaged_document(chance: Random, document: Any, times: int = 3) -> Any:
    """Some values replaced by odd ones, left out, renamed or put somewhere else."""
    document = copy.deepcopy(document)
    for _ in range(chance.randint(1, times)):
        if (place := some_place(chance, document)) is None:
            break
        container, key = place
        match chance.randrange(6):
            case 0:
                del container[key]
            case 1:
                container[key] = [container[key]]
            case 2 if isinstance(container, dict):
                container[chance.choice(ODD_TEXTS)] = container[key]
            case 3 if (other := some_place(chance, document)) is not None:
                container[key] = copy.deepcopy(other[0][other[1]])
            case _:
                container[key] = copy.deepcopy(chance.choice(ODD_VALUES))
    return document


def damaged_json(chance: Random, data: bytes) -> bytes:
    match chance.randrange(8):
        case 0:
            return damaged_bytes(chance, data)
        case 1:
            return chance.choice(
                (
                    b"",
                    b"[",
                    b"[" * 100_000,
                    b'{"a":' * 100_000,
                    b"null",
                    b"[]",
                    b"\xff\xfe{}",
                    b'"x"',
                )
            )
        case 2:
            return b"\xef\xbb\xbf" + data
        case _:
            return json.dumps(damaged_document(chance, json.loads(data))).encode()


# --------------------------------------------------------------------------- safetensors


def damaged_safetensors(chance: Random, data: bytes) -> bytes:
    """The header with its own length told truly, so that what it says is looked at."""
    if chance.randrange(5) == 0:
        return damaged_bytes(chance, data)
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"]
    for _ in range(chance.randint(1, 3)):
        entry = header[chance.choice(names)]
        other = header[chance.choice(names)]
        match chance.randrange(5):
            case 0:
                entry["data_offsets"] = other["data_offsets"]
            case 1:
                entry["shape"] = chance.choice(([], [0], [-1], [1 << 40], [1 << 32] * 2, [1.5]))
            case 2:
                entry["dtype"] = chance.choice(("F64", "F16", "I64", "BOOL", "F8_E4M3", "C64", ""))
            case 3:
                entry["shape"] = other["shape"]
            case _:
                header = damaged_document(chance, header, 1)
        whole = {"dtype", "shape", "data_offsets"}
        names = [n for n, e in header.items() if isinstance(e, dict) and e.keys() >= whole]
        if not names:
            break
    written = json.dumps(header).encode()
    return struct.pack("<Q", len(written)) + written + data[8 + length :]


# --------------------------------------------------------------------------- GGUF


def damaged_gguf(chance: Random, data: bytes) -> bytes:
    """Numbers of the header changed where they stand, or its metadata said anew with odd values."""
    match chance.randrange(5):
        case 0:
            return damaged_bytes(chance, data)
        case 1 | 2:
            return _damaged_metadata(chance, data)
    out = bytearray(data)
    numbers = GGUFNumbers(data).found
    for _ in range(chance.randint(1, 3)):
        at, size = chance.choice(numbers)
        old = int.from_bytes(out[at : at + size], "little")
        new = chance.choice((*HUGE_64, old + 1, old - 1, old * 2, old ^ 1))
        out[at : at + size] = (new % (1 << 8 * size)).to_bytes(size, "little")
    if chance.randrange(8) == 0:
        del out[chance.choice(numbers)[0] :]
    return bytes(out)


class GGUFNumbers:
    """Where every length, count, type, shape and scalar of a good file's header stands."""

    def __init__(self, data: bytes) -> None:
        self.found: list[tuple[int, int]] = []  # offset, bytes
        self._data, self._at = data, 4
        self._number(4)
        tensors, pairs = self._number(8), self._number(8)
        for _ in range(pairs):
            self._text()
            self._value(self._number(4))
        self.metadata_end = self._at
        for _ in range(tensors):
            self._text()
            for _ in range(self._number(4)):
                self._number(8)
            self._number(4)
            self._number(8)
        self.end = self._at

    def _number(self, size: int) -> int:
        self.found.append((self._at, size))
        self._at += size
        return int.from_bytes(self._data[self._at - size : self._at], "little")

    def _text(self) -> None:
        length = self._number(8)
        self._at += length

    def _value(self, kind: int) -> None:
        if kind == _TEXT:
            self._text()
        elif kind == _LIST:
            inner, count = self._number(4), self._number(8)
            for _ in range(count):
                self._value(inner)
        else:
            self._number({0: 1, 1: 1, 2: 2, 3: 2, 7: 1, 10: 8, 11: 8, 12: 8}.get(kind, 4))


_UNSIGNED, _SIGNED, _FLOAT, _BOOL, _TEXT, _LIST = 4, 5, 6, 7, 8, 9
_UNSIGNED_64, _SIGNED_64, _FLOAT_64 = 10, 11, 12
_ALIGNMENT = 32


def _damaged_metadata(chance: Random, data: bytes) -> bytes:
    with tempfile.NamedTemporaryFile(suffix=".gguf") as file:
        file.write(data)
        file.flush()
        header = read_header(Path(file.name))
    parts = GGUFNumbers(data)
    metadata = damaged_document(chance, header.metadata)
    pairs = [(name, stored) for name, value in metadata.items() if (stored := _gguf_value(value))]
    head = b"GGUF" + struct.pack("<IQQ", 3, len(header.tensors), len(pairs))
    for name, (kind, value) in pairs:
        head += _gguf_text(name) + struct.pack("<I", kind) + value
    head += data[parts.metadata_end : parts.end]
    tensors = data[-(-parts.end // _ALIGNMENT) * _ALIGNMENT :]
    return head + bytes(-len(head) % _ALIGNMENT) + tensors


def _gguf_text(text: str) -> bytes:
    encoded = text.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(encoded)) + encoded


def _gguf_value(value: Any) -> tuple[int, bytes] | None:
    """Type and bytes; None for what the format has no word for."""
    if isinstance(value, bool):
        return _BOOL, bytes([value])
    if isinstance(value, int):
        for kind, code, low, high in (
            (_UNSIGNED, "<I", 0, 1 << 32),
            (_SIGNED, "<i", -(1 << 31), 1 << 31),
            (_UNSIGNED_64, "<Q", 0, 1 << 64),
        ):
            if low <= value < high:
                return kind, struct.pack(code, value)
    if isinstance(value, float):
        return _FLOAT_64, struct.pack("<d", value)
    if isinstance(value, str):
        return _TEXT, _gguf_text(value)
    if not isinstance(value, list) or None in (items := [_gguf_value(item) for item in value]):
        return None
    kinds = {item[0] for item in items if item} or {_UNSIGNED}
    if len(kinds) > 1:  # lists are of one type: numbers become wide ones, all else is left out
        if not kinds <= {_UNSIGNED, _SIGNED}:
            return None
        return _LIST, _gguf_list(_SIGNED_64, [struct.pack("<q", item) for item in value])
    return _LIST, _gguf_list(kinds.pop(), [item[1] for item in items if item])


def _gguf_list(kind: int, items: list[bytes]) -> bytes:
    return struct.pack("<IQ", kind, len(items)) + b"".join(items)


# --------------------------------------------------------------------------- pickles in zips


def damaged_pth(chance: Random, data: bytes) -> bytes:
    """The archive written anew around a damaged part, so that its checksums are right again."""
    if chance.randrange(4) == 0:
        return damaged_bytes(chance, data)
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(out, "w") as target:
        parts = {part.filename: source.read(part) for part in source.infolist()}
        pickle = next(name for name in parts if name.endswith("data.pkl"))
        storages = [name for name in parts if "/data/" in name]
        match chance.randrange(5):
            case 0:
                parts[chance.choice(storages)] = b""
            case 1:
                del parts[chance.choice(list(parts))]
            case 2:
                one = chance.choice(storages)
                parts[one] = parts[one][: chance.randrange(len(parts[one]))]
            case _:
                parts[pickle] = damaged_bytes(chance, parts[pickle])
        for name, content in parts.items():
            target.writestr(name, content)
    return out.getvalue()


# --------------------------------------------------------------------------- protobuf


def damaged_vocabulary(chance: Random, data: bytes) -> bytes:
    """Of tokenizer.model, which is sentencepiece's or tiktoken's."""
    is_tiktoken = data[:1] not in (b"\n", b"\x12")
    return (damaged_lines if is_tiktoken else damaged_protobuf)(chance, data)


def damaged_lines(chance: Random, data: bytes) -> bytes:
    if chance.randrange(3) == 0:
        return damaged_bytes(chance, data)
    lines = data.splitlines(keepends=True)
    for _ in range(chance.randint(1, 3)):
        place = chance.randrange(len(lines))
        piece, rank = (*lines[place].split(), b"0", b"0")[:2]
        odd = chance.choice((b"-1", b"1_0", b"9" * 5000, b"\xd9\xa1", b"0", str(1 << 60).encode()))
        lines[place] = chance.choice(
            (b"", b"\n", piece + b" " + odd + b"\n", b" " + rank + b"\n", b"= " + rank + b"\n")
        )
    return b"".join(lines)


def damaged_protobuf(chance: Random, data: bytes) -> bytes:
    """Fields of a sentencepiece model changed, with the lengths around them told truly."""
    if chance.randrange(4) == 0:
        return damaged_bytes(chance, data)
    from model.tokenizer.sentencepiece_proto import _field, _fields, _varint

    fields = list(_fields(data))
    for _ in range(chance.randint(1, 3)):
        if not fields:
            break
        place = chance.randrange(len(fields))
        if chance.randrange(2):  # the trainer's and normalizer's settings, which come last
            place = max(0, len(fields) - 1 - chance.randrange(3))
        number, kind, value = fields[place]
        match chance.randrange(6):
            case 0:
                del fields[place]
            case 1:
                fields.insert(place, fields[chance.randrange(len(fields))])
            case 2 if kind == 2:
                fields[place] = (number, kind, damaged_bytes(chance, value, 2))
            case 3:
                fields[place] = (number, 0, _varint(chance.choice(HUGE_64)))
            case _ if kind == 2:
                fields[place] = (number, kind, _damaged_message(chance, value))
            case _:
                fields[place] = (chance.randrange(60), kind, value)
    return b"".join(_field(*field) for field in fields)


def _damaged_message(chance: Random, data: bytes) -> bytes:
    from model.tokenizer.sentencepiece_proto import _field, _fields, _varint

    try:
        fields = list(_fields(data))
    except ValueError:
        return damaged_bytes(chance, data, 1)
    if not fields:
        return _field(chance.randrange(50), 0, _varint(chance.choice(HUGE_64)))
    place = chance.randrange(len(fields))
    number, kind, value = fields[place]
    if kind == 0:
        value = _varint(chance.choice((*range(8), *HUGE_64)))
    elif kind == 5:
        value = struct.pack("<f", chance.choice((float("nan"), float("inf"), -1e38, 0.0)))
    else:
        value = chance.choice(ODD_TEXTS).encode("utf-8", "surrogatepass")
    fields[place] = (number, kind, value)
    return b"".join(_field(*field) for field in fields)


# --------------------------------------------------------------------------- by file name


Damage = Callable[[Random, bytes], bytes]


def damage_of(name: str) -> Damage:
    """The damage that knows the structure of a file so called."""
    if name.endswith(".json"):
        return damaged_json
    if name.endswith(".safetensors"):
        return damaged_safetensors
    if name.endswith(".gguf"):
        return damaged_gguf
    if name.endswith(".pth"):
        return damaged_pth
    if name == "tokenizer.model":
        return damaged_vocabulary
    return damaged_bytes
