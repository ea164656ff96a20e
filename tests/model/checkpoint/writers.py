"""Small random networks of transformers, and writers of them in every layout pronk reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0}


def llama(**changes: Any) -> PreTrainedModel:
    return random_network(LlamaForCausalLM, LlamaConfig(**{**SMALL, **changes}))


def random_network(kind: type[PreTrainedModel], config: Any, seed: int = 0) -> PreTrainedModel:
    """No weight is left at 0 or 1, so that none can be forgotten unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    model = kind(config).float().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(1.0 if "norm" in name else 0.0, 0.15, generator=generator)
    return model


# One network of every family and kind that differs in what its checkpoint holds.
FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": llama,
    "llama-tied": lambda: llama(tie_word_embeddings=True),
    "llama-biased": lambda: llama(attention_bias=True, mlp_bias=True),
    "llama-wide-heads": lambda: llama(head_dim=32),
    "llama-3.1": lambda: llama(rope_parameters=LLAMA3_ROPE),
    "llama-yarn": lambda: llama(rope_parameters=YARN_ROPE),
    "llama-linear": lambda: llama(rope_parameters=LINEAR_ROPE),
    "mistral": lambda: random_network(MistralForCausalLM, MistralConfig(**SMALL, sliding_window=8)),
    "qwen2": lambda: random_network(
        Qwen2ForCausalLM, Qwen2Config(**SMALL, tie_word_embeddings=True)
    ),
    "qwen3": lambda: random_network(Qwen3ForCausalLM, Qwen3Config(**SMALL, head_dim=32)),
}


# --------------------------------------------------------------------------- Hugging Face


def write_huggingface(model: PreTrainedModel, folder: Path, shards: bool = False) -> Path:
    model.save_pretrained(folder, max_shard_size="60KB" if shards else "1GB")
    return folder


# --------------------------------------------------------------------------- Meta


_META_NAMES = {
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
    "model.layers": "layers",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}
_BY_COLUMNS = ("attention.wo", "feed_forward.w2")


def write_meta(
    model: PreTrainedModel,
    folder: Path,
    ranks: int = 1,
    embedding_axis: int = 1,
    params: dict[str, Any] | None = None,
) -> Path:
    """``embedding_axis``: 1 as Llama 1 and 2 split the embedding, 0 as Llama 3."""
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Tensor]] = [{} for _ in range(ranks)]
    for name, tensor in model.state_dict().items():
        tensor = paired(model.config, name, tensor)
        for old, new in _META_NAMES.items():
            name = name.replace(old, new)
        for rank, part in enumerate(_split(name, tensor, ranks, embedding_axis)):
            shards[rank][name] = part.clone()
    for rank, shard in enumerate(shards):
        shard["rope.freqs"] = torch.ones(8)
        torch.save(shard, folder / f"consolidated.{rank:02}.pth")
    (folder / "params.json").write_text(json.dumps(meta_params(model.config) | (params or {})))
    return folder


def meta_params(config: Any) -> dict[str, Any]:
    """params.json as Meta writes it: the feed-forward's width only by its rule."""
    return {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "multiple_of": 32,
        "ffn_dim_multiplier": config.intermediate_size / int(8 * config.hidden_size / 3),
        "norm_eps": config.rms_norm_eps,
        "vocab_size": -1,
    }


def _split(name: str, tensor: Tensor, ranks: int, embedding_axis: int) -> list[Tensor]:
    if tensor.dim() == 1:
        return [tensor] * ranks
    axis = 1 if any(kind in name for kind in _BY_COLUMNS) else 0
    if "tok_embeddings" in name:
        axis = embedding_axis
    return list(tensor.chunk(ranks, axis))


def paired(config: Any, name: str, tensor: Tensor) -> Tensor:
    """Queries and keys with their rows in rotary pairs; everything else as it is."""
    if "self_attn.q_proj" in name:
        heads = config.num_attention_heads
    elif "self_attn.k_proj" in name:
        heads = config.num_key_value_heads
    else:
        return tensor
    halves = tensor.view(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


# --------------------------------------------------------------------------- GGUF


_GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.down_proj": "ffn_down",
    "mlp.up_proj": "ffn_up",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_GGUF_ARCHITECTURES = {"mistral": "llama"}
Quantization = gguf.GGMLQuantizationType


def write_gguf(
    model: PreTrainedModel, path: Path, kind: Quantization = Quantization.F32
) -> PreTrainedModel:
    """Writes matrices as ``kind`` and gives ``model`` the weights that the file now stands for."""
    config = model.config
    architecture = _GGUF_ARCHITECTURES.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, architecture)
    _add_metadata(writer, config)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        is_paired = architecture == "llama"
        source = paired(config, name, tensor) if is_paired else tensor
        data = blocks_of(source.numpy(), kind) if source.dim() == 2 else source.numpy()
        writer.add_tensor(_gguf_name(name), data, raw_dtype=kind if source.dim() == 2 else None)
        if source.dim() == 2:
            stored = torch.from_numpy(np.array(gguf.dequantize(data, kind)))
            tensor.copy_(_halved(config, name, stored) if is_paired else stored)
    _add_llama3_factors(writer, config)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _gguf_name(name: str) -> str:
    for old, new in _GGUF_NAMES.items():
        name = name.replace(old, new)
    return name


def _halved(config: Any, name: str, tensor: Tensor) -> Tensor:
    order = torch.arange(tensor.shape[0], dtype=torch.float32)[:, None]
    halves = torch.empty_like(tensor)
    halves[paired(config, name, order)[:, 0].long()] = tensor
    return halves


def _add_metadata(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if head_size := getattr(config, "head_dim", None):
        writer.add_key_length(head_size)
        writer.add_value_length(head_size)
        writer.add_rope_dimension_count(head_size)
    if window := getattr(config, "sliding_window", None):
        writer.add_sliding_window(window)
    if config.rope_parameters["rope_type"] in {"linear", "yarn"}:
        writer.add_rope_scaling_type(gguf.RopeScalingType(config.rope_parameters["rope_type"]))
        writer.add_rope_scaling_factor(config.rope_parameters["factor"])
    if original := config.rope_parameters.get("original_max_position_embeddings"):
        writer.add_rope_scaling_orig_ctx_len(original)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_token_list([f"<{number}>" for number in range(config.vocab_size)])


def _add_llama3_factors(writer: gguf.GGUFWriter, config: Any) -> None:
    """Llama 3.1's scaling as its converter stores it: one divisor a frequency, no metadata."""
    rope = config.rope_parameters
    if rope["rope_type"] != "llama3":
        return
    original = rope["original_max_position_embeddings"]
    factors = []
    for exponent in torch.arange(0, config.head_dim, 2) / config.head_dim:
        wavelength = 2 * torch.pi * rope["rope_theta"] ** float(exponent)
        if wavelength < original / rope["high_freq_factor"]:
            factors.append(1.0)
        elif wavelength > original / rope["low_freq_factor"]:
            factors.append(rope["factor"])
        else:
            low, high = rope["low_freq_factor"], rope["high_freq_factor"]
            smooth = (original / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    writer.add_tensor("rope_freqs.weight", np.array(factors, np.float32))


def blocks_of(weight: np.ndarray, kind: Quantization) -> np.ndarray:
    """Quantized by the gguf package where it can; otherwise random blocks with small scales."""
    try:
        return gguf.quantize(weight, kind)
    except NotImplementedError:
        return random_blocks(weight.shape, kind)


# Where a block holds 16-bit floats; the rest are integers that may be anything.
_SCALES = {Quantization.Q4_K: (0, 2), Quantization.Q5_K: (0, 2), Quantization.Q6_K: (208,)}


def random_blocks(shape: tuple[int, ...], kind: Quantization) -> np.ndarray:
    block, num_bytes = gguf.GGML_QUANT_SIZES[kind]
    random = np.random.default_rng(0)
    num_blocks = shape[0] * shape[1] // block
    blocks = random.integers(0, 256, (num_blocks, num_bytes), np.uint8)
    for place in _SCALES[kind]:
        scales = random.uniform(0.0001, 0.0003, num_blocks).astype(np.float16)
        blocks[:, place : place + 2] = scales.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(shape[0], -1)
