"""From a checkpoint to a network ready to run: checked by name and shape first, then streamed."""

from __future__ import annotations

import platform
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor

from model.checkpoint.errors import CheckpointError, some_names
from model.checkpoint.inspection import Checkpoint
from model.checkpoint.stored import StoredTensor, Weights
from model.kv_format import cache_format
from model.llama import Llama, WeightSlot
from model.schemes import check_scheme, dense

Progress: TypeAlias = Callable[[int, int], None]

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float": torch.float32,
    "half": torch.float16,
}
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def load(
    checkpoint: Checkpoint,
    dtype: str,
    device: str | torch.device,
    attention: str,
    progress: Progress | None,
    cache_dtype: str = "auto",
    quantization: str = "auto",
) -> Llama:
    device = torch.device(device)
    check_scheme(quantization, device)
    weights = _settle_tying(_open(checkpoint))
    _check_layers(weights)
    _check_sizes(checkpoint, weights)
    wanted = resolve_dtype(dtype, weights.config.dtype, device)
    pages = cache_format(cache_dtype, wanted)
    model = Llama(weights.config, wanted, device, attention=attention, cache_dtype=pages)
    model.quantize(quantization)
    fill(model.slots(), weights, wanted, progress)
    model.pack()
    return model.eval()


def _open(checkpoint: Checkpoint) -> Weights:
    """Only the layout at hand is imported: starting up is waited for."""
    if checkpoint.format == "huggingface":
        from model.checkpoint.huggingface import open_weights
    elif checkpoint.format == "meta":
        from model.checkpoint.meta import open_weights
    else:
        from model.checkpoint.gguf import open_weights
    return open_weights(checkpoint)


def resolve_dtype(dtype: str, stored: str, device: torch.device) -> torch.dtype:
    """``auto`` is the checkpoint's own, but for CPUs that would crawl in it.

    CPUs compute float16 at a tenth of the speed of anything else, and bfloat16 only some in
    hardware; bfloat16 stands in for float16 because its sources were mostly trained in it.
    """
    if dtype != "auto":
        return _DTYPES[dtype]
    if device.type == "cpu" and stored in {"float16", "bfloat16"}:
        return torch.bfloat16 if _has_bfloat16() else torch.float32
    return _DTYPES[stored]


def _has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AVX512-BF16, AMX, Arm's BF16)."""
    if platform.machine().lower() in {"x86_64", "amd64"}:
        # oneDNN would also emulate it on any AVX512, slower than float32.
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


# --------------------------------------------------------------------------- checks


def _settle_tying(weights: Weights) -> Weights:
    """Makes embedding and head agree with the config, whichever of the two the files hold.

    Tied checkpoints come with the embedding alone, the head alone, or both; where both differ the
    config is wrong and they are not tied (as transformers decides).
    """
    if not weights.config.tie_embeddings:
        return weights
    stored = {tensor.name: tensor for tensor in weights.tensors}
    head, embedding = stored.get(_HEAD), stored.get(_EMBEDDING)
    if head is None:
        return weights
    if embedding is None:
        renamed = [replace(t, name=_EMBEDDING) if t is head else t for t in weights.tensors]
        return Weights(weights.config, renamed)
    if _is_equal(head, embedding):
        return Weights(weights.config, [t for t in weights.tensors if t is not head])
    return Weights(replace(weights.config, tie_embeddings=False), weights.tensors)


def _is_equal(one: StoredTensor, other: StoredTensor) -> bool:
    if one.shape != other.shape:
        return False
    with one.read(torch.float32) as left, other.read(torch.float32) as right:
        if not (isinstance(left, Tensor) and isinstance(right, Tensor)):
            left, right = dense(left), dense(right)
        return torch.equal(left[:1], right[:1]) and torch.equal(left, right)


def _check_layers(weights: Weights) -> None:
    """Before the network is built, so that a lying config cannot ask for a million layers."""
    found = {int(match[1]) for tensor in weights.tensors if (match := _LAYER.match(tensor.name))}
    if len(found) < weights.config.num_layers:
        raise CheckpointError(
            f"the config says {weights.config.num_layers} layers, the files hold {len(found)}"
        )


def _check_sizes(checkpoint: Checkpoint, weights: Weights) -> None:
    """Many names may not stand for the same bytes (a tied head stored twice may)."""
    claimed = sum(tensor.num_bytes for tensor in weights.tensors)
    if claimed > 2 * checkpoint.num_bytes:
        raise CheckpointError(
            f"the tensors claim {claimed} bytes where the files hold {checkpoint.num_bytes}"
        )


def check_names(slots: Mapping[str, WeightSlot], tensors: list[StoredTensor]) -> None:
    """Every slot has its tensor, every tensor its slot, and their shapes agree."""
    stored = {tensor.name: tensor for tensor in tensors}
    if len(stored) < len(tensors):
        counts = Counter(tensor.name for tensor in tensors)
        doubled = [name for name, count in counts.items() if count > 1]
        raise CheckpointError(f"stored more than once: {some_names(doubled)}")
    problems = []
    if missing := slots.keys() - stored.keys():
        problems.append(f"{len(missing)} tensors are missing ({some_names(missing)})")
    if surplus := stored.keys() - slots.keys():
        problems.append(f"{len(surplus)} have no place in the network ({some_names(surplus)})")
    misshapen = {
        f"{name} is {list(stored[name].shape)}, expected {list(slots[name].shape)}"
        for name in slots.keys() & stored.keys()
        if slots[name].shape != stored[name].shape
    }
    if misshapen:
        problems.append(f"{len(misshapen)} are misshapen ({some_names(misshapen)})")
    if problems:
        raise CheckpointError("the weights do not fit the config: " + "; ".join(problems))


# --------------------------------------------------------------------------- filling


def fill(
    slots: Mapping[str, WeightSlot],
    weights: Weights,
    dtype: torch.dtype,
    progress: Progress | None = None,
) -> None:
    """Stores tensor after tensor, holding one source at a time; ``progress`` counts bytes read.

    The network takes memory only as its slots are filled, so nothing is taken for a wrong config.
    """
    check_names(slots, weights.tensors)
    done, total = 0, sum(tensor.num_bytes for tensor in weights.tensors)
    for stored in weights.tensors:
        _store(slots[stored.name], stored, dtype)
        done += stored.num_bytes
        if progress is not None:
            progress(done, total)


def _store(slot: WeightSlot, stored: StoredTensor, dtype: torch.dtype) -> None:
    """A function of its own, so that no name holds this tensor while the next one is read."""
    with stored.read(dtype) as tensor:
        slot.fill(tensor)
