"""Which of the three layouts a path holds, and which files belong to it. Imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from model.checkpoint.documents import read_json
from model.checkpoint.errors import CheckpointError, some_names

Format = Literal["huggingface", "meta", "gguf"]

_INDEX = "model.safetensors.index.json"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
_META_SHARD = re.compile(r"consolidated(?:\.(\d+))?\.pth")
_GGUF_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk, not yet read."""

    format: Format
    path: Path  # what was asked for: a folder or a .gguf file
    files: tuple[Path, ...]  # the weights, in reading order
    tokenizer: Path | None  # what load_tokenizer takes: a folder or a .gguf file

    @property
    def folder(self) -> Path:
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def num_bytes(self) -> int:
        """Size of the weight files."""
        return sum(file.stat().st_size for file in self.files)


def inspect(path: str | Path) -> Checkpoint:
    """Recognises the layout at a local path; CheckpointError says what is missing."""
    path = Path(path).expanduser()
    if path.is_file():
        return _inspect_file(path)
    if path.is_dir():
        return _inspect_folder(path)
    raise CheckpointError(f"{path}: no such file or folder")


def _inspect_file(path: Path) -> Checkpoint:
    if path.suffix == ".gguf":
        return Checkpoint("gguf", path, _gguf_parts(path), _tokenizer_of_gguf(path))
    if path.suffix in {".safetensors", ".pth", ".json"}:
        raise CheckpointError(f"{path.name} is one file of a checkpoint: give its folder instead")
    raise CheckpointError(f"{path.name} is neither a .gguf file nor a checkpoint folder")


def _inspect_folder(path: Path) -> Checkpoint:
    if safetensors := _safetensors_files(path):
        return Checkpoint("huggingface", path, safetensors, _tokenizer_of_folder(path))
    if shards := _meta_shards(path):
        return Checkpoint("meta", path, shards, _tokenizer_of_folder(path, path.parent))
    if ggufs := _found(path, "*.gguf"):
        whole = [file for file in ggufs if _part_number(file) in (None, 1)]
        if len(whole) != 1:
            raise CheckpointError(
                f"{path} holds several models: name one of {some_names([f.name for f in ggufs])}"
            )
        return Checkpoint("gguf", whole[0], _gguf_parts(whole[0]), _tokenizer_of_gguf(whole[0]))
    raise CheckpointError(_why_no_weights(path))


def _found(path: Path, pattern: str) -> list[Path]:
    """Files alone: a pipe would be waited for, a device has no end."""
    return sorted(file for file in path.glob(pattern) if file.is_file())


def _why_no_weights(path: Path) -> str:
    if (path / "adapter_config.json").is_file():
        return f"{path} holds an adapter (LoRA), not a model: give its base model"
    if any(path.glob("*.bin")) or any(path.glob("*.pt")):
        return (
            f"{path} holds its weights only as pickled .bin files, which can run code and are "
            "never opened: convert them to safetensors (transformers: "
            "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)) or use a revision "
            "that has them"
        )
    if _meta_shards(path / "original"):
        return f"{path} holds no weights itself: give {path / 'original'} instead"
    return (
        f"{path} holds no weights: expected *.safetensors with config.json, "
        "consolidated.*.pth with params.json, or a .gguf file"
    )


# --------------------------------------------------------------------------- Hugging Face


def _safetensors_files(path: Path) -> tuple[Path, ...]:
    if (path / _INDEX).is_file():
        return _indexed_files(path, read_json(path / _INDEX))
    if (path / "model.safetensors").is_file():
        return (path / "model.safetensors",)
    # Mistral's own copy of the same weights lies beside the sharded ones under this name.
    other = ("consolidated", "adapter_model")
    found = [file for file in _found(path, "*.safetensors") if not file.name.startswith(other)]
    if found:
        _refuse_gaps(found)
    elif (path / "consolidated.safetensors").is_file():
        raise CheckpointError(
            f"{path} holds only consolidated.safetensors (Mistral's own layout): "
            "use the Hugging Face layout of the same model"
        )
    return tuple(found)


def _indexed_files(path: Path, index: dict[str, Any]) -> tuple[Path, ...]:
    """The files an index names, none of which may lie outside the folder."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{_INDEX} has no weight_map")
    names = {str(name) for name in weight_map.values()}
    for name in sorted(names):
        if not _is_plain_name(name) or not name.endswith(".safetensors"):
            raise CheckpointError(f"{_INDEX} names {name!r}, which is no safetensors file here")
    if missing := {name for name in names if not (path / name).is_file()}:
        raise CheckpointError(
            f"{len(missing)} of {len(names)} shards are missing: {some_names(missing)}; "
            "download them again"
        )
    return tuple(path / name for name in sorted(names))


def _is_plain_name(name: str) -> bool:
    return name not in {"", ".", ".."} and not re.search(r"[/\\:\0]", name)


def _refuse_gaps(files: list[Path]) -> None:
    """Shards named model-00001-of-00003 tell how many there should be, also without an index."""
    for file in files:
        match = re.search(r"-\d{5}-of-(\d{5})\.safetensors$", file.name)
        if match and int(match[1]) != len(files):
            raise CheckpointError(
                f"{len(files)} of {int(match[1])} shards are here and {_INDEX} is missing; "
                "download them again"
            )


# --------------------------------------------------------------------------- Meta


def _meta_shards(path: Path) -> tuple[Path, ...]:
    if not (path / "params.json").is_file() or not path.is_dir():
        return ()
    shards = [
        file for file in _found(path, "consolidated*.pth") if _META_SHARD.fullmatch(file.name)
    ]
    for number, file in enumerate(shards):
        match = _META_SHARD.fullmatch(file.name)
        assert match is not None
        if match[1] is not None and int(match[1]) != number:
            raise CheckpointError(f"shard consolidated.{number:02}.pth is missing in {path}")
    return tuple(shards)


# --------------------------------------------------------------------------- GGUF


def _part_number(path: Path) -> int | None:
    match = _GGUF_PART.fullmatch(path.name)
    return int(match["number"]) if match else None


def _gguf_parts(path: Path) -> tuple[Path, ...]:
    """All parts of a model split as name-00001-of-00003.gguf; otherwise the file alone."""
    match = _GGUF_PART.fullmatch(path.name)
    if match is None:
        return (path,)
    count = int(match["count"])
    if int(match["number"]) != 1:
        raise CheckpointError(f"{path.name} is a later part: name the first of its {count} parts")
    names = [f"{match['stem']}-{number + 1:05}-of-{count:05}.gguf" for number in range(count)]
    if missing := [name for name in names if not (path.parent / name).is_file()]:
        raise CheckpointError(f"{len(missing)} of {count} parts are missing: {some_names(missing)}")
    return tuple(path.parent / name for name in names)


# --------------------------------------------------------------------------- tokenizers


def _tokenizer_of_folder(*folders: Path) -> Path | None:
    for folder in folders:
        if any((folder / name).is_file() for name in _TOKENIZER_FILES):
            return folder
    return None


def _tokenizer_of_gguf(path: Path) -> Path:
    """The file's own metadata hold its tokenizer; files beside it may be another model's."""
    return path
