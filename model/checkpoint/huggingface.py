"""Hugging Face folders: config.json, generation_config.json and safetensors files."""

from __future__ import annotations

import math
import re
from functools import partial
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from model.checkpoint.documents import read_json, read_optional_json
from model.checkpoint.errors import CheckpointError, some_names
from model.checkpoint.inspection import Checkpoint
from model.checkpoint.quantization_config import read_quantization
from model.checkpoint.stored import Reading, StoredTensor, Weights, mapped
from model.config import ModelConfig

if TYPE_CHECKING:
    import torch

_ITEM_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_QUANTIZED_SIZES = {"I64": 8, "I32": 4, "I8": 1, "U8": 1, "F8_E4M3": 1}
_DTYPES = {"F16": "float16", "BF16": "bfloat16"}  # float32 for the rest

# Buffers of old files that follow from the config.
_DERIVED = re.compile(r".*\.(rotary_emb\.inv_freq|masked_bias|attn\.bias)")
_MULTIMODAL = re.compile(r"(model\.)?(language_model|vision_model|vision_tower|visual)\.")


def read_config(checkpoint: Checkpoint) -> ModelConfig:
    if not (checkpoint.folder / "config.json").is_file():
        raise CheckpointError(f"{checkpoint.folder} holds safetensors files but no config.json")
    config = read_json(checkpoint.folder / "config.json")
    read_quantization(config)  # refuses what is not known
    if not config.get("dtype") and not config.get("torch_dtype"):
        config["torch_dtype"] = _stored_dtype(str(checkpoint.files[0]))
    generation = read_optional_json(checkpoint.folder / "generation_config.json")
    return ModelConfig.from_huggingface(config, generation)


def _stored_dtype(file: str) -> str:
    """Of the file's largest tensor, for configs that do not say; reads the header alone."""
    try:
        handle: Any = safe_open(file, framework="numpy")
        views = [handle.get_slice(name) for name in handle.offset_keys()]
    except (SafetensorError, OSError) as error:
        raise _damaged(file, error) from error
    largest = max(views, key=lambda view: math.prod(view.get_shape()), default=None)
    return _DTYPES.get(largest.get_dtype() if largest else "", "float32")


def open_weights(checkpoint: Checkpoint) -> Weights:
    config = read_config(checkpoint)
    quantization = read_quantization(read_json(checkpoint.folder / "config.json"))
    sizes = _ITEM_SIZES if quantization is None else _ITEM_SIZES | _QUANTIZED_SIZES
    tensors = [tensor for file in checkpoint.files for tensor in _tensors_of(str(file), sizes)]
    if quantization is not None:
        from model.checkpoint.prequantized import combine

        tensors = combine(tensors, quantization, config)
    return Weights(config, tensors)


def _tensors_of(file: str, sizes: dict[str, int]) -> list[StoredTensor]:
    """The tensors of one file in the order they lie in; the header is checked by safetensors."""
    try:
        handle: Any = safe_open(file, framework="pt")  # maps the file, reads the header
        names = [name for name in handle.offset_keys() if not _DERIVED.fullmatch(name)]
        _refuse_multimodal(names)
        return [_stored(handle, name, file, sizes) for name in names]
    except (SafetensorError, OSError, RuntimeError) as error:
        raise CheckpointError(
            f"{_base(file)} is damaged or no safetensors file: {error}"
        ) from error


def _stored(handle: Any, name: str, file: str, sizes: dict[str, int]) -> StoredTensor:
    view = handle.get_slice(name)
    shape, dtype = tuple(view.get_shape()), view.get_dtype()
    if dtype not in sizes:
        raise CheckpointError(
            f"{name} in {_base(file)} is stored as {dtype}, which is not supported: "
            "use a checkpoint in bfloat16, float16 or float32"
        )
    size = math.prod(shape) * sizes[dtype]
    return StoredTensor(name, shape, size, partial(_read, handle, name), dtype)


def _read(handle: Any, name: str, dtype: torch.dtype) -> Reading:
    return mapped(handle.get_tensor(name))


def _refuse_multimodal(names: list[str]) -> None:
    if found := [name for name in names if _MULTIMODAL.match(name)]:
        raise CheckpointError(
            f"the checkpoint holds more than a text model ({some_names(found, 1)}): "
            "vision and multimodal checkpoints are not supported"
        )


def _damaged(file: str, error: Exception) -> CheckpointError:
    return CheckpointError(f"{_base(file)} is damaged or no safetensors file: {error}")


def _base(file: str) -> str:
    return file.rsplit("/", 1)[-1]
