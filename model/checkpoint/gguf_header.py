"""The header of a GGUF file: metadata and where each tensor lies. Imports no torch.

The gguf package's own reader trusts the counts in the file (a lying one grows its lists without
end) and makes two numpy views for every element of a tokenizer's arrays; this one reads the same
format (ggml/docs/gguf.md, versions 2 and 3) with every length checked against the file's size.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from model.checkpoint.errors import CheckpointError

_MAGIC = b"GGUF"
_MAX_DIMENSIONS = 4
_MAX_ENTRIES = 1 << 22  # of any list; the longest real one has half a million (BPE merges)
_MIN_PAIR, _MIN_TENSOR = 13, 24  # bytes that the shortest of each takes in the file
_VALUE_TYPES = {int(kind): kind for kind in GGUFValueType}
_TENSOR_TYPES = {int(kind): kind for kind in GGMLQuantizationType}

_SCALARS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor: ``shape`` is outermost first, as PyTorch writes it."""

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file
    num_bytes: int


@dataclass(frozen=True)
class GGUFHeader:
    path: Path
    metadata: dict[str, Any]  # numbers, booleans, strings and lists of them
    tensors: dict[str, GGUFTensor]


def read_header(path: Path) -> GGUFHeader:
    """Reads and checks a header in time and memory bounded by its own size."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(path, data).header()
    except (OSError, ValueError, struct.error) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path.name} is damaged: {error}") from error


class _Reader:
    """A cursor over the mapped file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.size, self.at = path, data, len(data), 0

    def header(self) -> GGUFHeader:
        if self.take(4) != _MAGIC:
            raise self.damaged("it does not begin with GGUF")
        version = self.number("I")
        if version not in (2, 3):
            raise CheckpointError(f"{self.path.name} is GGUF version {version}; known are 2 and 3")
        num_tensors = self.count(_MIN_TENSOR)
        num_pairs = self.count(_MIN_PAIR)
        metadata = self.table(num_pairs, self.pair)
        tensors = self.table(num_tensors, self.tensor)
        return GGUFHeader(self.path, metadata, self.placed(tensors, metadata))

    def damaged(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self.path.name} is damaged or no GGUF file: {why}")

    # -------------------------------------------------------------- numbers and strings

    def take(self, num_bytes: int) -> bytes:
        if num_bytes > self.size - self.at:
            raise self.damaged("it ends within its header")
        self.at += num_bytes
        return self.data[self.at - num_bytes : self.at]

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def count(self, bytes_each: int) -> int:
        """How many things follow; never more than the rest of the file has room for."""
        value: int = self.number("Q")
        if value > _MAX_ENTRIES or value * bytes_each > self.size - self.at:
            raise self.damaged(f"it claims {value} entries, more than it has room for")
        return value

    def text(self) -> str:
        return self.take(self.count(1)).decode("utf-8", errors="replace")

    # -------------------------------------------------------------- metadata

    def table(self, count: int, read: Callable[[], tuple[str, Any]]) -> dict[str, Any]:
        entries: dict[str, Any] = {}
        for _ in range(count):
            name, value = read()
            if name in entries:
                raise self.damaged(f"{name!r} occurs twice")
            entries[name] = value
        return entries

    def pair(self) -> tuple[str, Any]:
        name = self.text()
        return name, self.value(self.value_type())

    def value_type(self) -> GGUFValueType:
        code = self.number("I")
        if code not in _VALUE_TYPES:
            raise self.damaged(f"it holds a value of unknown type {code}")
        return _VALUE_TYPES[code]

    def value(self, kind: GGUFValueType) -> Any:
        if kind == GGUFValueType.STRING:
            return self.text()
        if kind == GGUFValueType.ARRAY:
            return self.array(self.value_type())
        return self.number(_SCALARS[kind])

    def array(self, kind: GGUFValueType) -> list[Any]:
        if kind == GGUFValueType.ARRAY:
            raise self.damaged("it holds arrays of arrays")
        if kind == GGUFValueType.STRING:
            return [self.text() for _ in range(self.count(8))]
        code = _SCALARS[kind]
        count = self.count(struct.calcsize("<" + code))
        return list(struct.unpack(f"<{count}{code}", self.take(count * struct.calcsize(code))))

    # -------------------------------------------------------------- tensors

    def tensor(self) -> tuple[str, GGUFTensor]:
        """One entry; its offset still counts from where the data begin."""
        name = self.text()
        num_dimensions = self.number("I")
        if num_dimensions > _MAX_DIMENSIONS:
            raise self.damaged(f"{name!r} claims {num_dimensions} dimensions")
        shape = tuple(self.number("Q") for _ in range(num_dimensions))[::-1]
        code, offset = self.number("I"), self.number("Q")
        if code not in _TENSOR_TYPES:
            raise CheckpointError(f"{name} has the tensor type {code}, which is not known here")
        kind = _TENSOR_TYPES[code]
        return name, GGUFTensor(name, kind, shape, offset, self.stored_size(name, kind, shape))

    def stored_size(self, name: str, kind: GGMLQuantizationType, shape: tuple[int, ...]) -> int:
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if shape and shape[-1] % block:
            raise self.damaged(f"the rows of {name!r} are no whole number of blocks")
        return math.prod(shape) // int(block) * int(block_bytes)

    def placed(
        self, tensors: dict[str, GGUFTensor], metadata: dict[str, Any]
    ) -> dict[str, GGUFTensor]:
        """The tensors with their places in the file, in file order, none over another."""
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1):
            raise self.damaged(f"general.alignment is {alignment!r}")
        start = end = -(-self.at // alignment) * alignment
        placed = {}
        for tensor in sorted(tensors.values(), key=lambda tensor: tensor.offset):
            offset = start + tensor.offset
            is_inside = end <= offset and offset + tensor.num_bytes <= self.size
            if not is_inside or tensor.offset % alignment:
                raise CheckpointError(
                    f"{self.path.name} is truncated or damaged: {tensor.name} does not lie in it"
                )
            end = offset + tensor.num_bytes
            placed[tensor.name] = GGUFTensor(
                tensor.name, tensor.kind, tensor.shape, offset, tensor.num_bytes
            )
        return placed
