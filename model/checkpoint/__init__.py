"""Reads a checkpoint folder or file into a network: Hugging Face, Meta's original and GGUF layouts.

No code from a checkpoint is ever run, and nothing here touches the network (``hub`` does, when
asked for a model by its hub id). Importing this package imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.checkpoint.documents import read_optional_json
from model.checkpoint.errors import CheckpointError
from model.checkpoint.inspection import Checkpoint, inspect
from model.config import ModelConfig

if TYPE_CHECKING:
    import torch

    from model.llama import Llama

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "generation_defaults",
    "inspect",
    "load_config",
    "load_model",
]

_GENERATION_KEYS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def load_config(path: str | Path) -> ModelConfig:
    """The network a checkpoint describes, read without torch.

    ``tie_embeddings`` is what config and headers tell; loading compares the weights themselves.
    """
    checkpoint = inspect(path)
    if checkpoint.format == "huggingface":
        from model.checkpoint.huggingface import read_config
    elif checkpoint.format == "gguf":
        from model.checkpoint.gguf_config import read_config
    else:
        from model.checkpoint.meta_config import read_config
    return read_config(checkpoint)


def load_model(
    path: str | Path,
    *,
    dtype: str = "auto",
    device: str | torch.device = "cpu",
    attention: str = "auto",
    cache_dtype: str = "auto",
    progress: Callable[[int, int], None] | None = None,
    quantization: str = "auto",
) -> Llama:
    """The network of a local checkpoint, filled, packed and in eval mode.

    ``quantization``: auto (as the checkpoint is), none, int8, int4 or fp8. ``cache_dtype`` is of
    the pages it will be run over (model.kv_format). ``progress`` is called with (bytes done, bytes
    in all) after every tensor. Raises CheckpointError, or the config's own UnsupportedModel and
    InvalidConfig; all are ValueErrors.
    """
    from model.checkpoint.loading import load

    return load(inspect(path), dtype, device, attention, progress, cache_dtype, quantization)


def generation_defaults(path: str | Path) -> dict[str, Any]:
    """The sampling settings a checkpoint recommends, by the API's names; often none."""
    checkpoint = inspect(path)
    if checkpoint.format == "gguf":
        from model.checkpoint.gguf_config import generation_defaults as of_header
        from model.checkpoint.gguf_header import read_header

        stated = of_header(read_header(checkpoint.files[0]))
    else:
        stated = read_optional_json(checkpoint.folder / "generation_config.json")
    return {key: stated[key] for key in _GENERATION_KEYS if _is_number(stated.get(key))}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
