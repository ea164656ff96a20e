"""Writes a quantized copy of a Hugging Face folder, in compressed-tensors' pack-quantized format.

That format's words are this project's own bytes: values plus 2^(bits-1), inputs in order, lowest
bits first; vLLM and transformers read it too. Embedding, norms and head stay as they are.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from model.checkpoint.documents import read_json
from model.checkpoint.errors import CheckpointError
from model.checkpoint.huggingface import open_weights
from model.checkpoint.inspection import Checkpoint, inspect
from model.checkpoint.quantization_config import read_quantization
from model.checkpoint.stored import StoredTensor
from model.quantization import QuantizedWeight, fitting_group, quantize
from model.schemes import BITS, dense

_LINEAR = re.compile(
    r"(model\.layers\.\d+\.(?:self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj))\.weight"
)
_SHARD_BYTES = 1 << 30  # of a file; as much is held in memory
_COPIED = (".json", ".model", ".jinja", ".txt", ".md")
_NOT_COPIED = ("config.json", "model.safetensors.index.json")


def write_quantized(
    source: str | Path,
    target: str | Path,
    scheme: str,
    *,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """``progress`` hears (bytes read, bytes in all). The target is there whole or not at all.

    Raises CheckpointError, or OSError where the disk does.
    """
    checkpoint, target = inspect(source), Path(target).expanduser().resolve()
    config = _config_to_quantize(checkpoint)
    if scheme not in BITS:
        raise CheckpointError(f"checkpoints are written as int8 or int4, not {scheme!r}")
    _check_target(target, checkpoint.folder.resolve(), force)
    tensors = open_weights(checkpoint).tensors
    with _folder_that_becomes(target) as folder:
        groups = _write_shards(tensors, folder, BITS[scheme], progress)
        config["quantization_config"] = _quantization_config(BITS[scheme], groups)
        _write_json(folder / "config.json", config)
        for file in sorted(checkpoint.folder.iterdir()):
            if file.suffix in _COPIED and file.name not in _NOT_COPIED and file.is_file():
                shutil.copyfile(file, folder / file.name)


def _config_to_quantize(checkpoint: Checkpoint) -> dict[str, Any]:
    if checkpoint.format != "huggingface":
        raise CheckpointError(
            f"{checkpoint.path.name} has {checkpoint.format}'s layout; only Hugging Face folders "
            "are written anew: serve it with --quantization instead"
        )
    config = read_json(checkpoint.folder / "config.json")
    if read_quantization(config):
        raise CheckpointError(f"{checkpoint.path.name} is quantized already")
    config.pop("auto_map", None)  # code, which is not copied
    return config


def _check_target(target: Path, source: Path, force: bool) -> None:
    if target == source or target in source.parents or source in target.parents:
        raise CheckpointError("the new checkpoint may not lie in or around the old one")
    if not target.parent.is_dir():
        raise CheckpointError(f"{target.parent}: no such folder")
    if not target.exists():
        return
    if not force:
        raise CheckpointError(f"{target} is there already: choose another name or give --force")
    is_empty = target.is_dir() and not any(target.iterdir())
    if not is_empty and not (target / "config.json").is_file():
        raise CheckpointError(f"{target} is no checkpoint folder: --force replaces nothing else")


@contextmanager
def _folder_that_becomes(target: Path) -> Iterator[Path]:
    """A folder beside the target that takes its place if all goes well, and is removed if not."""
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield folder
        folder.chmod(0o777 & ~_umask())
        for file in folder.iterdir():
            file.chmod(0o666 & ~_umask())
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
            target.rename(old / target.name)
            folder.rename(target)
            shutil.rmtree(old, ignore_errors=True)
        else:
            folder.rename(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _write_shards(
    tensors: list[StoredTensor],
    folder: Path,
    bits: int,
    progress: Callable[[int, int], None] | None,
) -> dict[str, int | None]:
    """Groups by layer, None for those left dense. The index is written where it takes one."""
    groups: dict[str, int | None] = {}
    shards: list[list[str]] = []
    held: dict[str, Tensor] = {}
    done, total, size = 0, sum(tensor.num_bytes for tensor in tensors), 0
    for stored in tensors:
        held |= _written(stored, bits, groups)
        done += stored.num_bytes
        if progress is not None:
            progress(done, total)
        if sum(t.numel() * t.element_size() for t in held.values()) >= _SHARD_BYTES:
            size += _save(held, folder, shards)
    if held:
        size += _save(held, folder, shards)
    _name_shards(folder, shards, size)
    return groups


def _written(stored: StoredTensor, bits: int, groups: dict[str, int | None]) -> dict[str, Tensor]:
    """What the file holds of one tensor."""
    match = _LINEAR.fullmatch(stored.name)
    with stored.read(torch.float32) as weight:
        tensor = dense(weight)
        if match is None:
            return {stored.name: tensor.clone()}
        group = groups[match[1]] = fitting_group(stored.shape[1], bits)
        if group is None or stored.shape[1] * bits % 32:
            groups[match[1]] = None
            return {stored.name: tensor.clone()}
        return _packed(match[1], quantize(tensor, bits, group))


def _packed(layer: str, small: QuantizedWeight) -> dict[str, Tensor]:
    return {
        f"{layer}.weight_packed": small.values.view(torch.int32),
        f"{layer}.weight_scale": small.scales.bfloat16(),  # they were rounded to it
        f"{layer}.weight_shape": torch.tensor(small.shape),
    }


def _save(held: dict[str, Tensor], folder: Path, shards: list[list[str]]) -> int:
    save_file(held, folder / f"{len(shards)}.safetensors", metadata={"format": "pt"})
    shards.append(list(held))
    held.clear()
    return (folder / f"{len(shards) - 1}.safetensors").stat().st_size


def _name_shards(folder: Path, shards: list[list[str]], size: int) -> None:
    if len(shards) == 1:
        (folder / "0.safetensors").rename(folder / "model.safetensors")
        return
    places: dict[str, str] = {}
    for number, names in enumerate(shards):
        final = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        (folder / f"{number}.safetensors").rename(folder / final)
        places |= dict.fromkeys(names, final)
    index = {"metadata": {"total_size": size}, "weight_map": places}
    _write_json(folder / "model.safetensors.index.json", index)


def _quantization_config(bits: int, groups: dict[str, int | None]) -> dict[str, Any]:
    """The commonest group is every linear layer's; others are named."""
    counts = Counter(group for group in groups.values() if group is not None)
    if not counts:
        raise CheckpointError(f"no layer's inputs are a multiple of a group of {bits}-bit weights")
    commonest = counts.most_common(1)[0][0]
    targets = {group: [n for n, g in groups.items() if g == group] for group in counts}
    targets[commonest] = ["Linear"]
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "ignore": ["lm_head", *(name for name, group in groups.items() if group is None)],
        "config_groups": {
            f"group_{number}": {
                "targets": names,
                "weights": _scheme(bits, group),
                "input_activations": None,
                "output_activations": None,
            }
            for number, (group, names) in enumerate(targets.items())
        },
    }


def _scheme(bits: int, group: int) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": group,
        "actorder": None,
        "dynamic": False,
    }


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
