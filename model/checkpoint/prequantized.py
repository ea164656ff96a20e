"""Quantized tensors of Hugging Face folders as the layers' weights, their integers untouched.

Where the formats are defined:
- AWQ (gemm): casper-hansen/AutoAWQ, awq/utils/packing_utils.py. qweight [K, N / 8] int32, the
  eight outputs of a word in the order 0 2 4 6 1 3 5 7, lowest bits first; qzeros [G, N / 8] alike.
- GPTQ: AutoGPTQ/AutoGPTQ, nn_modules/qlinear. qweight [K * bits / 32, N] int32, inputs of a word
  lowest bits first; qzeros [G, N * bits / 32] (the first format stores each less one); g_idx [K].
- compressed-tensors: vllm-project/compressed-tensors, compressors/. weight_packed int32
  [N, K * bits / 32] of signed values plus 2^(bits-1); weight_zero_point packed alike along N.
- fp8: weight [N, K] e4m3 times weight_scale (or weight_scale_inv, DeepSeek's name for the same).
"""

# N outputs, K inputs, G groups of inputs

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from model.checkpoint.errors import CheckpointError
from model.checkpoint.quantization_config import Group, Prequantized
from model.checkpoint.stored import StoredTensor
from model.config import ModelConfig
from model.float8 import Float8Weight
from model.quantization import QuantizedWeight, pack_halves
from model.schemes import Quantized

Members: TypeAlias = Mapping[str, StoredTensor]  # by what follows the layer's name
Tensors: TypeAlias = Mapping[str, Tensor]

_PART = re.compile(
    r"(.+)\.(qweight|qzeros|scales|g_idx"
    r"|weight_(?:packed|scale|scale_inv|shape|zero_point|g_idx))"
)
_ACTIVATIONS = re.compile(  # scales of what runs through the network: computed here, if needed
    r".+\.(input_scale|input_zero_point|input_scale_ub|activation_scale|output_scale|[kvq]_scale)"
)
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # where in a word each of eight outputs lies


def combine(
    tensors: list[StoredTensor], quantization: Prequantized, config: ModelConfig
) -> list[StoredTensor]:
    """The files' tensors with those of one layer made one, called ``.weight``.

    Shapes are checked here, before a byte is read. Raises CheckpointError.
    """
    tensors = [t for t in tensors if not _ACTIVATIONS.fullmatch(t.name)]
    layers = {match[1] for t in tensors if (match := _PART.fullmatch(t.name))}
    parts: dict[str, dict[str, StoredTensor]] = {}
    for tensor in tensors:
        layer, _, part = tensor.name.rpartition(".")
        if layer in layers and part != "bias":
            parts.setdefault(layer, {})[part] = tensor
    combined = []
    for tensor in tensors:
        layer, _, part = tensor.name.rpartition(".")
        if layer not in layers or part == "bias":
            if not _is_idle_bias(tensor, config):
                combined.append(_plain(tensor))
        elif members := parts.pop(layer, None):
            combined.append(_weight(layer, members, quantization))
    return combined


def _plain(tensor: StoredTensor) -> StoredTensor:
    if tensor.kind and tensor.kind not in {"F64", "F32", "F16", "BF16"}:
        raise CheckpointError(f"{tensor.name} is stored as {tensor.kind} and has no scales")
    return tensor


def _is_idle_bias(tensor: StoredTensor, config: ModelConfig) -> bool:
    """GPTQ's tools write biases of 0 for layers that have none."""
    match = re.fullmatch(r".+\.(self_attn|mlp)\.(.)\w*_proj\.bias", tensor.name)
    if match is None:
        return False
    has_bias = config.mlp_bias if match[1] == "mlp" else config.qkv_bias
    if match[1] == "self_attn" and match[2] == "o":
        has_bias = config.output_bias
    if has_bias:
        return False
    with tensor.read(torch.float32) as bias:
        return isinstance(bias, Tensor) and not bias.any()


def _weight(layer: str, members: Members, quantization: Prequantized) -> StoredTensor:
    group = quantization.group_of(layer)
    if group is None:
        raise CheckpointError(f"{layer} is quantized, but the config says not how")
    shape, make = _LAYOUTS[group.method](layer, members, group)
    size = sum(member.num_bytes for member in members.values())
    return StoredTensor(f"{layer}.weight", shape, size, partial(_read, members, make))


Layout: TypeAlias = tuple[tuple[int, int], Callable[[Tensors], Quantized]]


@contextmanager
def _read(
    members: Members, make: Callable[[Tensors], Quantized], dtype: torch.dtype
) -> Iterator[Quantized]:
    with ExitStack() as stack:
        opened = {part: stack.enter_context(t.read(dtype)) for part, t in members.items()}
        yield make({part: t for part, t in opened.items() if isinstance(t, Tensor)})


# --------------------------------------------------------------------------- checks


def _member(layer: str, members: Members, part: str, *kinds: str) -> StoredTensor:
    found = members.get(part)
    if found is None:
        raise CheckpointError(f"{layer} has no {part}")
    if kinds and found.kind not in kinds:
        raise CheckpointError(f"{found.name} is stored as {found.kind}, expected {kinds[0]}")
    return found


def _matrix(tensor: StoredTensor) -> tuple[int, int]:
    if len(tensor.shape) != 2 or 0 in tensor.shape:
        raise CheckpointError(f"{tensor.name} is {list(tensor.shape)}, expected a matrix")
    return tensor.shape[0], tensor.shape[1]


def _expect(tensor: StoredTensor, *shapes: tuple[int, ...]) -> None:
    if tensor.shape not in shapes:
        wanted = " or ".join(str(list(shape)) for shape in shapes)
        raise CheckpointError(f"{tensor.name} is {list(tensor.shape)}, expected {wanted}")


def _groups(layer: str, inputs: int, stated: int | None) -> tuple[int, int]:
    """(inputs a group, groups)."""
    group = stated or inputs
    if inputs % group:
        raise CheckpointError(f"{layer} has {inputs} inputs, no multiple of its groups of {group}")
    return group, inputs // group


_FLOATS = ("F16", "BF16", "F32")


# --------------------------------------------------------------------------- AWQ


def _awq(layer: str, members: Members, stated: Group) -> Layout:
    inputs, words = _matrix(_member(layer, members, "qweight", "I32"))
    group, count = _groups(layer, inputs, stated.group)
    _expect(_member(layer, members, "scales", *_FLOATS), (count, words * 8))
    _expect(_member(layer, members, "qzeros", "I32"), (count, words))

    def make(tensors: Tensors) -> QuantizedWeight:
        values = _awq_unpacked(tensors["qweight"]).t().contiguous()
        zeros = _awq_unpacked(tensors["qzeros"]).t().contiguous()
        scales = tensors["scales"].t().float()
        return QuantizedWeight(pack_halves(values), scales, _if_any(zeros, 4), 4, group)

    return (words * 8, inputs), make


def _awq_unpacked(words: Tensor) -> Tensor:
    """[X, N / 8] int32 -> [X, N] uint8."""
    values = _unpacked(words, 4).view(len(words), -1, 8)
    return values[:, :, _AWQ_PLACES].flatten(1)


# --------------------------------------------------------------------------- GPTQ


def _gptq(layer: str, members: Members, stated: Group) -> Layout:
    words, outputs = _matrix(_member(layer, members, "qweight", "I32"))
    each = 32 // stated.bits
    inputs = words * each
    group, count = _groups(layer, inputs, stated.group)
    _expect(_member(layer, members, "scales", *_FLOATS), (count, outputs))
    _expect(_member(layer, members, "qzeros", "I32"), (count, -(-outputs // each)))
    if "g_idx" in members:
        _expect(_member(layer, members, "g_idx", "I32"), (inputs,))

    def make(tensors: Tensors) -> QuantizedWeight:
        zeros = _unpacked(tensors["qzeros"], stated.bits)[:, :outputs].int() + stated.zero_offset
        if bool((zeros > 255).any()):
            raise CheckpointError(f"{layer}.qzeros holds a zero of 256")
        weight = QuantizedWeight(
            _bytes(tensors["qweight"].t()),
            tensors["scales"].t().float(),
            _if_any(zeros.t().to(torch.uint8).contiguous(), stated.bits),
            stated.bits,
            group,
        )
        return _sorted_by_group(layer, weight, tensors.get("g_idx"))

    return (outputs, inputs), make


def _sorted_by_group(layer: str, weight: QuantizedWeight, index: Tensor | None) -> QuantizedWeight:
    """``index`` [K] names each input's group. Groups of unequal size are refused."""
    if index is None or bool((index == -1).all()):
        return weight
    inputs, count = weight.shape[1], weight.scales.shape[1]
    if int(index.min()) < 0 or int(index.max()) >= count:
        raise CheckpointError(f"{layer}.g_idx names groups that are not among its {count}")
    ascending = torch.arange(inputs) // weight.group
    if torch.equal(index.long(), ascending):
        return weight
    in_order, order = index.long().sort(stable=True)
    if not torch.equal(in_order, ascending):
        raise CheckpointError(f"{layer}.g_idx gives its groups unequal numbers of inputs")
    values = weight.unpacked()[:, order]
    values = values if weight.bits == 8 else pack_halves(values)
    return QuantizedWeight(values, weight.scales, weight.zeros, weight.bits, weight.group, order)


# --------------------------------------------------------------------------- compressed-tensors


def _packed(layer: str, members: Members, stated: Group) -> Layout:
    outputs, words = _matrix(_member(layer, members, "weight_packed", "I32"))
    each = 32 // stated.bits
    inputs = words * each
    group, count = _groups(layer, inputs, stated.group)
    scale = _member(layer, members, "weight_scale", *_FLOATS)
    _expect(scale, (outputs, count), *(((1,), (1, 1)) if count == 1 else ()))
    if "weight_g_idx" in members:
        _expect(_member(layer, members, "weight_g_idx", "I32"), (inputs,))
    if not stated.is_symmetric:
        zero = _member(layer, members, "weight_zero_point", "I32", "I8")
        packed = (-(-outputs // each), count)
        _expect(zero, packed if zero.kind == "I32" else (outputs, count))

    def make(tensors: Tensors) -> QuantizedWeight:
        zeros = None
        if not stated.is_symmetric:
            zeros = _compressed_zeros(tensors["weight_zero_point"], stated.bits, outputs)
        weight = QuantizedWeight(
            _bytes(tensors["weight_packed"]),
            tensors["weight_scale"].float().expand(outputs, count),
            zeros,
            stated.bits,
            group,
        )
        return _sorted_by_group(layer, weight, tensors.get("weight_g_idx"))

    return (outputs, inputs), make


def _compressed_zeros(stored: Tensor, bits: int, outputs: int) -> Tensor:
    if stored.dtype == torch.int32:
        return _unpacked(stored.t(), bits)[:, :outputs].t()
    return (stored.int() + (1 << (bits - 1))).to(torch.uint8)


def _integers(layer: str, members: Members, stated: Group) -> Layout:
    shape = outputs, inputs = _matrix(_member(layer, members, "weight", "I8"))
    group, count = _groups(layer, inputs, stated.group)
    whole = ((1,), (), (1, 1), (outputs,)) if count == 1 else ()
    _expect(_member(layer, members, "weight_scale", *_FLOATS), (outputs, count), *whole)
    if not stated.is_symmetric:
        _expect(_member(layer, members, "weight_zero_point", "I8"), (outputs, count), *whole)

    def make(tensors: Tensors) -> QuantizedWeight:
        zeros = None
        if not stated.is_symmetric:
            zeros = _by_output(tensors["weight_zero_point"], outputs, count).view(torch.uint8) ^ 128
        return QuantizedWeight(
            tensors["weight"].contiguous().view(torch.uint8) ^ 128,  # plus 128
            _by_output(tensors["weight_scale"].float(), outputs, count),
            zeros,
            8,
            group,
        )

    return shape, make


def _by_output(stored: Tensor, outputs: int, count: int) -> Tensor:
    if stored.numel() == outputs * count:
        return stored.reshape(outputs, count)
    return stored.reshape(1, 1).expand(outputs, count).contiguous()


# --------------------------------------------------------------------------- fp8


def _fp8(layer: str, members: Members, stated: Group) -> Layout:
    shape = outputs, inputs = _matrix(_member(layer, members, "weight", "F8_E4M3"))
    name = "weight_scale_inv" if "weight_scale_inv" in members else "weight_scale"
    scale = _member(layer, members, name, *_FLOATS)
    tall, wide = 1, inputs
    if scale.shape in ((), (1,), (1, 1)):
        tall = outputs
    elif scale.shape not in ((outputs,), (outputs, 1)):
        if stated.block is None:
            raise CheckpointError(f"{scale.name} is {list(scale.shape)}, expected {[outputs, 1]}")
        tall, wide = min(stated.block[0], outputs), min(stated.block[1], inputs)
        _expect(scale, (-(-outputs // tall), -(-inputs // wide)))

    def make(tensors: Tensors) -> Float8Weight:
        scales = tensors[name].float().reshape(-(-outputs // tall), -(-inputs // wide))
        return Float8Weight(tensors["weight"], scales, (tall, wide))

    return shape, make


# --------------------------------------------------------------------------- bits


def _bytes(words: Tensor) -> Tensor:
    """[X, W] int32 -> [X, 4 W] uint8, lowest first; files and processors are little-endian."""
    return words.contiguous().view(torch.uint8)


def _unpacked(words: Tensor, bits: int) -> Tensor:
    """[X, W] int32 -> [X, W * 32 / bits] uint8, lowest bits first."""
    whole = _bytes(words)
    return whole if bits == 8 else torch.stack((whole & 15, whole >> 4), dim=-1).flatten(1)


def _if_any(zeros: Tensor, bits: int) -> Tensor | None:
    """None where all are the middle, which then need not be read."""
    return None if bool((zeros == 1 << (bits - 1)).all()) else zeros


_LAYOUTS: dict[str, Callable[[str, Members, Group], Layout]] = {
    "awq": _awq,
    "gptq": _gptq,
    "packed": _packed,
    "integers": _integers,
    "fp8": _fp8,
}
