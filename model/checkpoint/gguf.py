"""GGUF files: one file, or one split into parts, unpacked by the gguf package."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize
from torch import Tensor

from model.checkpoint.errors import CheckpointError
from model.checkpoint.gguf_config import ROPE_FACTORS, config_of, read_headers
from model.checkpoint.gguf_header import GGUFTensor
from model.checkpoint.inspection import Checkpoint
from model.checkpoint.stored import StoredTensor, Weights, forget_pages, halves_from_pairs
from model.config import ModelConfig
from model.quantization import QuantizedWeight
from model.schemes import AnyWeight

_LAYER = re.compile(r"blk\.(\d+)\.(.+)\.(weight|bias)")
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_PLAIN: dict[GGMLQuantizationType, Any] = {
    GGMLQuantizationType.F64: np.float64,
    GGMLQuantizationType.F32: np.float32,
    GGMLQuantizationType.F16: np.float16,
    GGMLQuantizationType.BF16: np.int16,  # numpy has no bfloat16: viewed as such by torch
}
# Blocks of 32 with one float16 scale, which are kept as they are: 8 bits, or 4 bits less 8.
_KEPT = {GGMLQuantizationType.Q8_0: 8, GGMLQuantizationType.Q4_0: 4}
_SLICE = 1 << 20  # numbers unpacked at a time: 4 MiB, and the gguf package's temporaries


def open_weights(checkpoint: Checkpoint) -> Weights:
    headers = read_headers(checkpoint)
    config = config_of(headers)
    is_llama = headers[0].metadata["general.architecture"] == "llama"
    tensors = [
        _stored(np.memmap(header.path, np.uint8, "c"), tensor, config if is_llama else None)
        for header in headers
        for tensor in header.tensors.values()
        if tensor.name != ROPE_FACTORS
    ]
    return Weights(config, tensors)


# --------------------------------------------------------------------------- tensors


def _stored(data: np.ndarray, tensor: GGUFTensor, llama: ModelConfig | None) -> StoredTensor:
    """``llama``: the config where queries and keys have their rows in rotary pairs."""
    if tensor.kind not in _PLAIN and not _can_unpack(tensor.kind):
        raise CheckpointError(
            f"{tensor.name} is stored as {tensor.kind.name}, which the gguf package cannot unpack"
        )
    heads = None
    if llama and re.fullmatch(r"blk\.\d+\.attn_[qk]\.(weight|bias)", tensor.name):
        heads = llama.num_heads if ".attn_q." in tensor.name else llama.num_kv_heads
    raw = data[tensor.offset : tensor.offset + tensor.num_bytes]
    read = partial(_read, raw, tensor, heads)
    return StoredTensor(_name(tensor.name), tensor.shape, tensor.num_bytes, read)


def _name(name: str) -> str:
    """Hugging Face's name; one that has none is kept and will be surplus."""
    match = _LAYER.fullmatch(name)
    if match is None or match[2] not in _LAYER_NAMES:
        return _NAMES.get(name, name)
    return f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}.{match[3]}"


@contextmanager
def _read(
    raw: np.ndarray, stored: GGUFTensor, heads: int | None, dtype: torch.dtype
) -> Iterator[AnyWeight]:
    if stored.kind in _KEPT and len(stored.shape) == 2:
        weight = _kept(raw, stored)
        yield weight if heads is None else weight.outputs(_halved_rows(stored.shape[0], heads))
    else:
        tensor = _plain(raw, stored) if stored.kind in _PLAIN else _unpacked(raw, stored, dtype)
        yield tensor if heads is None else halves_from_pairs(tensor, heads)
    forget_pages(raw.ctypes.data, raw.nbytes)


def _plain(raw: np.ndarray, stored: GGUFTensor) -> Tensor:
    tensor = torch.from_numpy(raw.view(_PLAIN[stored.kind]).reshape(stored.shape))
    is_bfloat16 = stored.kind == GGMLQuantizationType.BF16
    return tensor.view(torch.bfloat16) if is_bfloat16 else tensor


def _kept(raw: np.ndarray, stored: GGUFTensor) -> QuantizedWeight:
    """Q8_0: a scale, 32 signed bytes. Q4_0: a scale, 16 bytes, input i beside input i + 16."""
    bits, rows = _KEPT[stored.kind], stored.shape[0]
    blocks = torch.from_numpy(raw.reshape(rows, -1, GGML_QUANT_SIZES[stored.kind][1]))
    scales = blocks[:, :, :2].contiguous().view(torch.float16).squeeze(-1).float()
    values = blocks[:, :, 2:]
    if bits == 8:
        values = values ^ 128  # plus 128
    else:
        even, odd = values[:, :, ::2], values[:, :, 1::2]
        values = torch.cat((even & 15 | odd << 4, even >> 4 | odd & 240), dim=-1)
    return QuantizedWeight(values.flatten(1), scales, None, bits, 32)


def _halved_rows(rows: int, heads: int) -> Tensor:
    return halves_from_pairs(torch.arange(rows).unsqueeze(1), heads).squeeze(1)


def _unpacked(raw: np.ndarray, stored: GGUFTensor, dtype: torch.dtype) -> Tensor:
    """Unpacks a few rows at a time, so that float32 copies of a whole tensor never exist."""
    rows = raw.reshape(math.prod(stored.shape[:-1]), -1)
    whole = torch.empty(len(rows), stored.shape[-1], dtype=dtype)
    step = max(1, _SLICE // stored.shape[-1])
    with np.errstate(all="ignore"):  # damaged scales overflow; that is no reason to warn
        for start in range(0, len(rows), step):
            part = dequantize(rows[start : start + step], stored.kind)
            whole[start : start + step] = torch.from_numpy(part)
    return whole.reshape(stored.shape)


@cache
def _can_unpack(kind: GGMLQuantizationType) -> bool:
    try:
        with np.errstate(all="ignore"):
            dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True
