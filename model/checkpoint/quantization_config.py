"""How a Hugging Face config says that its weights are quantized. Imports no torch.

Sources: transformers.utils.quantization_config (AwqConfig, GPTQConfig, FbgemmFp8Config,
FineGrainedFP8Config) and compressed-tensors' QuantizationConfig.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from model.checkpoint.errors import CheckpointError

Method = Literal["awq", "gptq", "packed", "integers", "fp8"]

_ADVICE = "use the unquantized checkpoint or a GGUF file"
_PACKED_FORMATS = {
    "pack-quantized": "packed",
    "int-quantized": "integers",
    "float-quantized": "fp8",
    "naive-quantized": "integers",
}


@dataclass(frozen=True)
class Group:
    """How the layers ``targets`` name are stored; an empty tuple means every linear layer."""

    method: Method
    bits: int
    group: (
        int | None
    )  # inputs that share a scale; None: all of a row, or what the scales' shape says
    is_symmetric: bool
    targets: tuple[str, ...] = ()
    block: tuple[int, int] | None = None  # of fp8: outputs and inputs that share a scale
    zero_offset: int = 0  # added to every stored zero (GPTQ's first format stores one less)

    def covers(self, layer: str) -> bool:
        """Whether a target is the layer's name, the end of it, its kind, or a pattern of it."""
        return not self.targets or any(_matches(target, layer) for target in self.targets)


@dataclass(frozen=True)
class Prequantized:
    """The first group that covers a layer says how it is stored."""

    name: str  # what the config calls it
    groups: tuple[Group, ...]

    def group_of(self, layer: str) -> Group | None:
        return next((group for group in self.groups if group.covers(layer)), None)


def _matches(target: str, layer: str) -> bool:
    if target.startswith("re:"):
        try:
            return re.match(target[3:], layer) is not None
        except re.error as error:
            raise CheckpointError(f"the quantization target {target!r} is no pattern") from error
    return target == "Linear" or layer == target or layer.endswith("." + target)


def read_quantization(config: Mapping[str, Any]) -> Prequantized | None:
    """None for a checkpoint that is not quantized. Raises CheckpointError for what is not known."""
    stated = config.get("quantization_config") or config.get("compression_config")
    if not stated:
        return None
    if not isinstance(stated, Mapping):
        raise CheckpointError("quantization_config is no table")
    method = stated.get("quant_method") or stated.get("quantization_type") or "unknown"
    reader = _READERS.get(method) if isinstance(method, str) else None
    if reader is None:
        raise CheckpointError(
            f"the weights are quantized with {method!r}, which is not supported: {_ADVICE}"
        )
    return Prequantized(method, reader(stated))


def _awq(stated: Mapping[str, Any]) -> tuple[Group, ...]:
    version = str(stated.get("version", "gemm")).lower()
    if version != "gemm":
        raise CheckpointError(f"AWQ's {version!r} packing is not supported, only 'gemm': {_ADVICE}")
    bits = _number(stated, "bits", stated.get("w_bit"))
    if bits != 4:
        raise CheckpointError(f"AWQ weights of {bits} bits are not supported, only 4: {_ADVICE}")
    group = _group_size(stated, "group_size", stated.get("q_group_size"))
    return (Group("awq", bits, group, is_symmetric=False),)


def _gptq(stated: Mapping[str, Any]) -> tuple[Group, ...]:
    bits = _number(stated, "bits")
    if bits not in (4, 8):
        raise CheckpointError(f"GPTQ weights of {bits} bits are not supported: {_ADVICE}")
    form = str(stated.get("checkpoint_format") or "gptq")
    if form not in ("gptq", "gptq_v2"):
        raise CheckpointError(f"GPTQ's format {form!r} is not supported: {_ADVICE}")
    offset = 1 if form == "gptq" else 0
    group = _group_size(stated, "group_size")
    return (Group("gptq", bits, group, is_symmetric=False, zero_offset=offset),)


def _fp8(stated: Mapping[str, Any]) -> tuple[Group, ...]:
    block = stated.get("weight_block_size")
    return (Group("fp8", 8, None, is_symmetric=True, block=_block(block)),)


def _block(block: Any) -> tuple[int, int] | None:
    if block is None:
        return None
    if not isinstance(block, list) or len(block) != 2 or not all(map(_is_count, block)):
        raise CheckpointError(f"the blocks of fp8 weights are {block!r}")
    return block[0], block[1]


def _compressed(stated: Mapping[str, Any]) -> tuple[Group, ...]:
    """compressed-tensors: groups of layers, each with a scheme and perhaps a format of its own."""
    sparsity = stated.get("sparsity_config")
    if isinstance(sparsity, Mapping) and sparsity.get("format", "dense") != "dense":
        raise CheckpointError(f"sparse weights ({sparsity.get('format')}) are not supported")
    if stated.get("transform_config"):
        raise CheckpointError(f"weights under transforms are not supported: {_ADVICE}")
    groups = stated.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise CheckpointError("quantization_config has no config_groups")
    found = [_compressed_group(group, stated.get("format")) for group in groups.values()]
    return tuple(sorted(found, key=lambda group: "Linear" in group.targets))  # names go first


def _compressed_group(group: Any, form: Any) -> Group:
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping):
        raise CheckpointError("a group of quantization_config says nothing of weights")
    form = group.get("format") or form
    bits, kind = _number(weights, "num_bits"), weights.get("type", "int")
    method = _PACKED_FORMATS.get(form) if isinstance(form, str) else None
    if method == "integers" and kind == "float":
        method = "fp8"
    if method is None or bits not in (4, 8) or (kind == "float") != (method == "fp8"):
        raise CheckpointError(
            f"compressed-tensors weights as {form!r}, {bits} bits of {kind!r}, "
            f"are not supported: {_ADVICE}"
        )
    targets = group.get("targets")
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise CheckpointError("a group of quantization_config names no targets")
    is_grouped = weights.get("strategy") in ("group", "tensor_group")
    return Group(
        method,  # type: ignore[arg-type]
        bits,
        _group_size(weights, "group_size") if is_grouped else None,
        is_symmetric=weights.get("symmetric", True) is not False,
        targets=tuple(targets),
        block=_block(weights.get("block_structure")) if method == "fp8" else None,
    )


def _number(stated: Mapping[str, Any], key: str, other: Any = None) -> int:
    value = stated.get(key, other)
    if not _is_count(value):
        raise CheckpointError(f"quantization_config says {key} is {value!r}")
    return int(value)


def _group_size(stated: Mapping[str, Any], key: str, other: Any = None) -> int | None:
    """None where a row has one scale, which files write as -1."""
    value = stated.get(key, other)
    if value in (-1, None):
        return None
    if not _is_count(value):
        raise CheckpointError(f"quantization_config says {key} is {value!r}")
    return int(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 32


_READERS = {
    "awq": _awq,
    "gptq": _gptq,
    "fp8": _fp8,
    "fbgemm_fp8": _fp8,
    "compressed-tensors": _compressed,
}
