"""Low-rank adapters from PEFT folders: adapter_config.json beside adapter_model.safetensors.

An adapter adds scale * B A to some of the network's weights. Everything is known by name and shape
before a byte of it is read, so a file that lies takes no memory. Pickled files are refused.
"""

# r rank, K inputs, N outputs

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.checkpoint.documents import read_json
from model.checkpoint.errors import CheckpointError, some_names
from model.lora_config import AdapterError, AdapterNotFound, LoraConfig

__all__ = ["Adapter", "AdapterError", "AdapterNotFound", "LowRank", "read_adapter"]

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight")
_FOREIGN = {  # what a tensor's name gives away
    "lora_embedding_": "adapts an embedding",
    "lora_magnitude_vector": "belongs to DoRA",
    "modules_to_save": "is a module trained in full",
    ".bias": "is a bias",
}
_DTYPES = {"F32", "F16", "BF16"}

Shapes: TypeAlias = Mapping[str, tuple[int, int]]  # module: (N, K) of its weight


@dataclass(frozen=True)
class LowRank:
    """What one module's adapter multiplies by, the scale in ``up``: delta = x @ down.T @ up."""

    down: Tensor  # [r, K]
    up: Tensor  # [r, N]

    @property
    def rank(self) -> int:
        return self.down.size(0)


@dataclass(frozen=True)
class Adapter:
    """By the Hugging Face name of the module each part adapts (``model.layers.0.mlp.up_proj``)."""

    weights: dict[str, LowRank]

    @property
    def num_bytes(self) -> int:
        return sum(one.down.nbytes + one.up.nbytes for one in self.weights.values())

    def pinned(self) -> Adapter:
        """In memory a GPU copies from while the host goes on."""
        return Adapter(
            {
                name: LowRank(one.down.pin_memory(), one.up.pin_memory())
                for name, one in self.weights.items()
            }
        )


def read_adapter(folder: Path, shapes: Shapes, max_rank: int, dtype: torch.dtype) -> Adapter:
    """For a network whose linear layers have those shapes. Raises AdapterError."""
    try:
        return _read(folder, shapes, max_rank, dtype)
    except AdapterError:
        raise
    except CheckpointError as error:  # of the JSON
        raise AdapterError(str(error)) from error
    except OSError as error:
        raise AdapterError(f"the adapter cannot be read: {error.strerror}") from error


def _read(folder: Path, shapes: Shapes, max_rank: int, dtype: torch.dtype) -> Adapter:
    if not (folder / CONFIG).is_file():
        raise AdapterNotFound(f"there is no adapter: the folder holds no {CONFIG}")
    config = LoraConfig.from_peft(read_json(folder / CONFIG))
    if not (folder / WEIGHTS).is_file():
        if (folder / PICKLE).exists():
            raise AdapterError(
                f"{PICKLE} is a pickle, which may run code when it is read: save the adapter as "
                f"{WEIGHTS}"
            )
        raise AdapterNotFound(f"there is no adapter: the folder holds no {WEIGHTS}")
    try:
        handle: Any = safe_open(str(folder / WEIGHTS), framework="pt")
        pairs = _pairs(handle)
        _check_targets(config, pairs.keys(), shapes)
        for module, names in pairs.items():
            _check_pair(handle, module, names, config.rank_of(module), shapes[module], max_rank)
        return Adapter(
            {
                module: _low_rank(handle, module, names, config.scale_of(module), dtype)
                for module, names in pairs.items()
            }
        )
    except (SafetensorError, RuntimeError) as error:
        raise AdapterError(f"{WEIGHTS} is damaged or no safetensors file: {error}") from error


def _pairs(handle: Any) -> dict[str, dict[str, str]]:
    """module: {"A": its tensor's name, "B": its tensor's name}."""
    pairs: dict[str, dict[str, str]] = {}
    for name in handle.keys():  # noqa: SIM118 (a handle is no dictionary)
        found = _TENSOR.fullmatch(name)
        if found is None:
            what = next((what for mark, what in _FOREIGN.items() if mark in name), "is unknown")
            raise AdapterError(f"{_shown(name)} {what}, which is not supported")
        pair = pairs.setdefault(found[1], {})
        if found[2] in pair:
            raise AdapterError(f"{_shown(found[1])} is adapted twice")
        pair[found[2]] = name
    if not pairs:
        raise AdapterError(f"{WEIGHTS} holds no tensor")
    halves = [module for module, pair in pairs.items() if len(pair) < 2]
    if halves:
        raise AdapterError(f"lora_A or lora_B is missing: {_shown(some_names(halves))}")
    return pairs


def _check_targets(config: LoraConfig, found: Any, shapes: Shapes) -> None:
    """Every adapted module is in the network, and is what the config says."""
    if strangers := found - shapes.keys():
        raise AdapterError(
            f"{len(strangers)} adapted modules are no linear layers of this network "
            f"({_shown(some_names(strangers))})"
        )
    named = config.names(shapes)
    if named is None:
        return
    if missing := named - found:
        raise AdapterError(
            f"target_modules names {len(missing)} modules without tensors "
            f"({_shown(some_names(missing))})"
        )
    if surplus := found - named:
        raise AdapterError(
            f"{len(surplus)} adapted modules are not named by target_modules "
            f"({_shown(some_names(surplus))})"
        )


def _check_pair(
    handle: Any,
    module: str,
    names: Mapping[str, str],
    rank: int,
    shape: tuple[int, int],
    max_rank: int,
) -> None:
    outputs, inputs = shape
    if rank > max_rank:
        raise AdapterError(
            f"{module} has rank {rank}, this server takes at most {max_rank}: raise --max-lora-rank"
        )
    for side, wanted in (("A", [rank, inputs]), ("B", [outputs, rank])):
        view = handle.get_slice(names[side])
        stored, dtype = list(view.get_shape()), view.get_dtype()
        if stored != wanted:
            raise AdapterError(f"lora_{side} of {module} is {stored}, expected {wanted}")
        if dtype not in _DTYPES:
            raise AdapterError(
                f"lora_{side} of {module} is stored as {dtype}, which is not supported"
            )


def _low_rank(
    handle: Any, module: str, names: Mapping[str, str], scale: float, dtype: torch.dtype
) -> LowRank:
    """Copied: what is mapped would end the process when its file is cut."""
    down = handle.get_tensor(names["A"]).to(dtype, copy=True).contiguous()
    up = (handle.get_tensor(names["B"]).float() * scale).to(dtype).t().contiguous()
    if not bool(down.isfinite().all() and up.isfinite().all()):
        raise AdapterError(f"the adapter of {module} holds values that are not finite in {dtype}")
    return LowRank(down, up)


def _shown(text: str) -> str:
    """Of a stranger's file, in an error: printable and short."""
    shown = repr(text)[1:-1]
    return shown if len(shown) <= 200 else shown[:197] + "..."
