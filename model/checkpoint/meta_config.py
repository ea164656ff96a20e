"""The config of Meta's layout, from params.json and the shards' headers. Imports no torch.

params.json leaves the vocabulary's size, the dtype and whether head and embedding are one to the
weights. The header of a .pth file is a pickle, read here by a reader that knows the five names a
table of tensors is made of and refuses every other: it calls nothing that the file names.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.checkpoint.errors import CheckpointError
from model.checkpoint.inspection import Checkpoint
from model.checkpoint.meta_params import MetaParams, read_params
from model.config import ModelConfig

EMBEDDING, HEAD = "tok_embeddings.weight", "output.weight"
_MAX_HEADER = 4 << 20  # that of a 405B checkpoint's shard is a third of a MiB
# Those torch.save writes. A tuple met again doubles what hashing it costs, so only a few may be.
_OPCODES = set(
    """
PROTO STOP FRAME MARK GLOBAL REDUCE BUILD NEWTRUE NEWFALSE NONE BINPERSID BINPUT LONG_BINPUT
BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT BINUNICODE SHORT_BINUNICODE MEMOIZE BINGET LONG_BINGET
TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_TUPLE EMPTY_DICT EMPTY_LIST SETITEM SETITEMS APPEND APPENDS
""".split()  # noqa: SIM905
)
_MAX_SHARED_TUPLES = 30
_STORAGES = {
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
}


@dataclass(frozen=True)
class PickledTensor:
    dtype: str
    shape: tuple[int, ...]
    content: tuple[int, int]  # checksum and size of the storage: alike where the numbers are


def read_config(checkpoint: Checkpoint) -> ModelConfig:
    params = read_params(checkpoint.folder / "params.json")
    shards = [read_header(file) for file in checkpoint.files]
    if any(EMBEDDING not in shard for shard in shards):
        raise CheckpointError(f"{checkpoint.files[0].name} holds no {EMBEDDING}")
    embedding = shards[0][EMBEDDING]
    if len(embedding.shape) != 2:
        raise CheckpointError(f"{EMBEDDING} has the shape {list(embedding.shape)}")
    ranks = 1 if is_split_by_columns(params, embedding.shape) else len(shards)
    config = params.huggingface_config(embedding.shape[0] * ranks, embedding.dtype)
    config["tie_word_embeddings"] = all(
        HEAD not in shard or shard[HEAD].content == shard[EMBEDDING].content for shard in shards
    )
    return ModelConfig.from_huggingface(config)


def is_split_by_columns(params: MetaParams, shape: tuple[int, ...]) -> bool:
    """Of a shard's part of the embedding: Llama 1 and 2 split columns, Llama 3 rows."""
    return len(shape) == 2 and shape[1] < params.width


def read_header(file: Path) -> dict[str, PickledTensor]:
    """What tensors a .pth file holds, without reading or running any of it."""
    try:
        prefix, data, parts = _checked(file)
        header = _Header(data, prefix, parts).load()
    except CheckpointError:
        raise
    except Exception as error:  # what a damaged pickle raises is as varied as the damage
        raise CheckpointError(f"{file.name} is damaged or holds more than tensors") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file.name} holds no table of tensors")
    return {name: found for name, found in header.items() if isinstance(found, PickledTensor)}


def check_header(file: Path) -> None:
    """Raises CheckpointError for a .pth whose table would take for ever to follow."""
    try:
        _checked(file)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{file.name} is damaged: {error}") from error


def _checked(file: Path) -> tuple[str, bytes, dict[str, zipfile.ZipInfo]]:
    """The archive's folder, the pickle in it and all its parts. Raises whatever damage raises."""
    with zipfile.ZipFile(file) as archive:
        parts = {part.filename: part for part in archive.infolist()}
        if len(parts) < len(archive.infolist()):
            raise CheckpointError(f"{file.name} is damaged: two of its parts have one name")
        names = [name for name in parts if name.endswith("/data.pkl")]
        if len(names) != 1 or parts[names[0]].file_size > _MAX_HEADER:
            raise CheckpointError(f"{file.name} holds no table of tensors")
        data = archive.read(names[0])
    _check_opcodes(file, data)
    return names[0].removesuffix("data.pkl"), data, parts


def _check_opcodes(file: Path, data: bytes) -> None:
    """Before any of it is followed: a few hundred bytes could keep a processor busy for ever."""
    tuples: set[Any] = set()  # where in the memo
    shared = numbered = 0
    last = ""
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name not in _OPCODES:
            raise CheckpointError(
                f"{file.name} holds more than tensors ({opcode.name} in its table)"
            )
        if opcode.name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            place = numbered if opcode.name == "MEMOIZE" else argument
            numbered += 1
            (tuples.add if last.startswith("TUPLE") else tuples.discard)(place)
        elif opcode.name in ("BINGET", "LONG_BINGET"):
            shared += argument in tuples
        last = opcode.name
    if shared > _MAX_SHARED_TUPLES:
        raise CheckpointError(f"{file.name} is damaged: its table is tied up in itself")


class _Header(pickle.Unpickler):
    """Makes descriptions where torch would make tensors."""

    def __init__(self, data: bytes, prefix: str, parts: dict[str, zipfile.ZipInfo]) -> None:
        super().__init__(io.BytesIO(data))
        self._prefix, self._parts = prefix, parts

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _described
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a table of tensors")

    def persistent_load(self, pid: Any) -> tuple[str, tuple[int, int]]:
        """A storage: ("storage", its kind, its key, ...)."""
        part = self._parts[f"{self._prefix}data/{pid[2]}"]
        return pid[1], (part.CRC, part.file_size)


def _described(storage: Any, _offset: Any, shape: Any, *_rest: Any) -> PickledTensor:
    dtype, content = storage
    return PickledTensor(str(dtype), tuple(map(int, shape)), content)
