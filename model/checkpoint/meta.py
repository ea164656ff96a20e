"""Meta's own layout: consolidated.NN.pth (one a model-parallel rank), params.json, tokenizer.model.

Source of names, shard axes and the feed-forward width: meta-llama/llama-models (model.py).
"""

from __future__ import annotations

import math
import pickle
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.checkpoint.errors import CheckpointError
from model.checkpoint.inspection import Checkpoint
from model.checkpoint.meta_config import EMBEDDING, check_header, is_split_by_columns
from model.checkpoint.meta_params import MetaParams, read_params
from model.checkpoint.stored import StoredTensor, Weights, forget, halves_from_pairs
from model.config import ModelConfig

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_LAYER = re.compile(r"layers\.(\d+)\.(.+)")
_DERIVED = re.compile(r"(.*\.)?rope\.freqs")  # follows from the config


@dataclass(frozen=True)
class _Kind:
    """Where a tensor goes, along which axis ranks split it (None: every rank holds it whole)."""

    name: str
    axis: int | None = None
    heads: str | None = None  # "q" or "k": rows in rotary pairs; "k" or "v": may be repeated


_KINDS = {
    "tok_embeddings.weight": _Kind("model.embed_tokens.weight", 0),
    "norm.weight": _Kind("model.norm.weight"),
    "output.weight": _Kind("lm_head.weight", 0),
    "attention.wq.weight": _Kind("self_attn.q_proj.weight", 0, "q"),
    "attention.wk.weight": _Kind("self_attn.k_proj.weight", 0, "k"),
    "attention.wv.weight": _Kind("self_attn.v_proj.weight", 0, "v"),
    "attention.wo.weight": _Kind("self_attn.o_proj.weight", 1),
    "feed_forward.w1.weight": _Kind("mlp.gate_proj.weight", 0),
    "feed_forward.w2.weight": _Kind("mlp.down_proj.weight", 1),
    "feed_forward.w3.weight": _Kind("mlp.up_proj.weight", 0),
    "attention_norm.weight": _Kind("input_layernorm.weight"),
    "ffn_norm.weight": _Kind("post_attention_layernorm.weight"),
}


def open_weights(checkpoint: Checkpoint) -> Weights:
    params = read_params(checkpoint.folder / "params.json")
    shards = [_load_shard(file) for file in checkpoint.files]
    tensors = [_stored(params, name, _parts(shards, name)) for name in _names(shards)]
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    if "model.embed_tokens.weight" not in shapes:
        raise CheckpointError(f"{checkpoint.files[0].name} holds no {EMBEDDING}")
    vocab_size = shapes["model.embed_tokens.weight"][0]
    dtype = shards[0][EMBEDDING].dtype
    config = params.huggingface_config(vocab_size, str(dtype).removeprefix("torch."))
    return Weights(ModelConfig.from_huggingface(config), tensors)


# --------------------------------------------------------------------------- files


def _load_shard(file: Path) -> dict[str, Tensor]:
    """Maps one shard. Only tensors are unpickled: anything else in the file is refused."""
    _refuse_compressed(file)
    check_header(file)
    try:
        shard = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file.name} holds more than tensors and was not opened: its pickle could run code"
        ) from error
    except Exception as error:  # what a damaged pickle raises is as varied as the damage
        raise CheckpointError(f"{file.name} is damaged: {_first_line(error)}") from error
    if not isinstance(shard, dict) or not shard:
        raise CheckpointError(f"{file.name} holds no table of tensors")
    for name, tensor in shard.items():
        _check_tensor(file, name, tensor)
    return shard


def _refuse_compressed(file: Path) -> None:
    """torch.save stores its parts as they are: a compressed part can only be a bomb."""
    try:
        with zipfile.ZipFile(file) as archive:
            parts = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise CheckpointError(f"{file.name} is damaged or no PyTorch file: {error}") from error
    size = file.stat().st_size
    if any(part.compress_type != zipfile.ZIP_STORED or part.file_size > size for part in parts):
        raise CheckpointError(f"{file.name} holds compressed parts, as torch.save never writes")


def _check_tensor(file: Path, name: Any, tensor: Any) -> None:
    if not isinstance(name, str) or not isinstance(tensor, Tensor):
        raise CheckpointError(f"{file.name} holds {name!r}, which is no tensor")
    if tensor.dtype not in _DTYPES or tensor.layout != torch.strided or tensor.is_meta:
        raise CheckpointError(
            f"{name} in {file.name} is {str(tensor.dtype).removeprefix('torch.')}, which is not "
            "supported: use a checkpoint in bfloat16, float16 or float32"
        )
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise CheckpointError(f"{name} in {file.name} claims more numbers than the file holds")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# --------------------------------------------------------------------------- tensors


def _names(shards: list[dict[str, Tensor]]) -> list[str]:
    return [name for name in shards[0] if not _DERIVED.fullmatch(name)]


def _parts(shards: list[dict[str, Tensor]], name: str) -> list[Tensor]:
    if missing := [number for number, shard in enumerate(shards) if name not in shard]:
        raise CheckpointError(f"{name} is missing in consolidated.{missing[0]:02}.pth")
    return [shard[name] for shard in shards]


def _stored(params: MetaParams, name: str, parts: list[Tensor]) -> StoredTensor:
    kind, axis = _place(params, name, parts)
    if axis is None:
        parts = parts[:1]
    elif kind.heads in {"k", "v"}:
        parts = _without_repeats(params, parts)
    whole = list(parts[0].shape)
    if axis is not None:
        whole[axis] = sum(part.shape[axis] for part in parts)
    heads = {"q": params.num_heads, "k": params.num_kv_heads}.get(kind.heads or "")

    @contextmanager
    def read(dtype: torch.dtype) -> Iterator[Tensor]:
        tensor = parts[0] if axis is None or len(parts) == 1 else torch.cat(parts, axis)
        yield tensor if heads is None else halves_from_pairs(tensor, heads)
        for part in parts:
            forget(part)

    size = math.prod(whole) * parts[0].element_size()
    return StoredTensor(kind.name, tuple(whole), size, read)


def _place(params: MetaParams, name: str, parts: list[Tensor]) -> tuple[_Kind, int | None]:
    """The kind and the axis of this tensor; a name of no kind keeps it and will be surplus."""
    match = _LAYER.fullmatch(name)
    kind = _KINDS.get(match[2] if match else name)
    if kind is None:
        return _Kind(name), None
    if match:
        kind = _Kind(f"model.layers.{match[1]}.{kind.name}", kind.axis, kind.heads)
    axis = kind.axis
    if name == EMBEDDING and is_split_by_columns(params, parts[0].shape):
        axis = 1
    _check_parts(name, parts, axis)
    return kind, axis


def _check_parts(name: str, parts: list[Tensor], axis: int | None) -> None:
    def fixed(part: Tensor) -> list[int]:
        return [extent for number, extent in enumerate(part.shape) if number != axis]

    dimensions = 1 if axis is None else 2
    if any(part.dim() != dimensions or fixed(part) != fixed(parts[0]) for part in parts):
        shapes = [list(part.shape) for part in parts]
        raise CheckpointError(f"{name} has shapes {shapes[:4]} in its shards, which do not fit")
    if any(part.dtype != parts[0].dtype for part in parts):
        raise CheckpointError(f"{name} has another dtype in every shard")


def _without_repeats(params: MetaParams, parts: list[Tensor]) -> list[Tensor]:
    """With more ranks than key-value heads, neighbouring ranks hold copies of one head."""
    repeats, rest = divmod(sum(part.shape[0] for part in parts), params.kv_width)
    return parts[::repeats] if repeats > 1 and rest == 0 else parts
