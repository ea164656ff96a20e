"""The metadata of a GGUF file, read as a Hugging Face config. Imports no torch.

Keys: gguf.constants.Keys; what writes them: llama.cpp's convert_hf_to_gguf.py.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType

from model.checkpoint.errors import CheckpointError
from model.checkpoint.gguf_header import GGUFHeader, GGUFTensor, read_header
from model.checkpoint.inspection import Checkpoint
from model.config import ModelConfig

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_STORED_DTYPES = {"F64": "float32", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
ROPE_FACTORS = "rope_freqs.weight"
_SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}


def read_config(checkpoint: Checkpoint) -> ModelConfig:
    return config_of(read_headers(checkpoint))


def read_headers(checkpoint: Checkpoint) -> list[GGUFHeader]:
    """Of every part; the first one holds the metadata."""
    headers = [read_header(file) for file in checkpoint.files]
    count = headers[0].metadata.get("split.count") or 1
    if count != len(headers):
        raise CheckpointError(
            f"{checkpoint.path.name} is one of {count} parts: keep their names "
            "(...-00001-of-000NN.gguf) and give the first"
        )
    return headers


def config_of(headers: list[GGUFHeader]) -> ModelConfig:
    tensors = {name: tensor for header in headers for name, tensor in header.tensors.items()}
    whole = GGUFHeader(headers[0].path, headers[0].metadata, tensors)
    return ModelConfig.from_huggingface(huggingface_config(whole, _rope_factors(headers)))


def _rope_factors(headers: list[GGUFHeader]) -> np.ndarray | None:
    for header in headers:
        if tensor := header.tensors.get(ROPE_FACTORS):
            if tensor.kind != GGMLQuantizationType.F32:
                raise CheckpointError(f"{ROPE_FACTORS} is {tensor.kind.name}, expected F32")
            return np.fromfile(header.path, np.float32, tensor.num_bytes // 4, offset=tensor.offset)
    return None


def huggingface_config(header: GGUFHeader, rope_factors: np.ndarray | None) -> dict[str, Any]:
    """``rope_factors``: what rope_freqs.weight holds, one divisor for every rotary frequency."""
    keys = _Keys(header)
    if "token_embd.weight" not in header.tensors:
        raise CheckpointError(f"{header.path.name} holds no token_embd.weight")
    window = keys.optional("attention.sliding_window")
    architecture = _ARCHITECTURES[keys.architecture]
    if window and keys.architecture == "llama":
        architecture = "MistralForCausalLM"
    heads, width = keys.count("attention.head_count"), keys.count("embedding_length")
    head_size = keys.count("attention.key_length", width // max(heads, 1))
    _refuse_odd_heads(keys, head_size)
    theta = keys.real("rope.freq_base", 10_000.0)
    return {
        "architectures": [architecture],
        "hidden_act": "silu",
        "vocab_size": header.tensors["token_embd.weight"].shape[0],
        "hidden_size": width,
        "intermediate_size": keys.count("feed_forward_length"),
        "num_hidden_layers": keys.count("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.count("attention.head_count_kv", heads),
        "head_dim": head_size,
        "max_position_embeddings": keys.count("context_length"),
        "rms_norm_eps": keys.real("attention.layer_norm_rms_epsilon", None),
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(keys, theta, head_size, rope_factors),
        "sliding_window": window,
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "attention_bias": "blk.0.attn_q.bias" in header.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in header.tensors,
        "bos_token_id": header.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": _end_tokens(header),
        "torch_dtype": _dtype(header.tensors.values()),
    }


def generation_defaults(header: GGUFHeader) -> dict[str, Any]:
    """The sampling settings newer files carry, under generation_config.json's names."""
    found = {
        name: header.metadata.get(f"general.sampling.{key}") for key, name in _SAMPLING.items()
    }
    return {name: _short(value) for name, value in found.items() if value is not None}


class _Keys:
    """Typed reading of the keys that begin with the architecture's name."""

    def __init__(self, header: GGUFHeader) -> None:
        self.metadata = header.metadata
        self.architecture = str(header.metadata.get("general.architecture"))
        if self.architecture not in _ARCHITECTURES or self.optional("expert_count"):
            experts = " with experts" if self.optional("expert_count") else ""
            raise CheckpointError(
                f"{header.path.name} holds the architecture {self.architecture!r}{experts}, which "
                f"is not supported; GGUF files of these are: {', '.join(_ARCHITECTURES)}"
            )

    def optional(self, key: str) -> Any:
        return self.metadata.get(f"{self.architecture}.{key}")

    def count(self, key: str, default: int | None = None) -> int:
        """A positive number; a list with one number a layer must say the same for all."""
        value = self.optional(key)
        if isinstance(value, list) and len(set(value)) == 1:
            value = value[0]
        value = default if value is None else value
        if not isinstance(value, int) or not 0 < value < 1 << 31:
            raise CheckpointError(f"{self.architecture}.{key} is {_shown(value)} in the GGUF file")
        return value

    def real(self, key: str, default: float | None) -> float:
        value = self.optional(key)
        value = default if value is None else value
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise CheckpointError(f"{self.architecture}.{key} is {_shown(value)} in the GGUF file")
        return float(_short(value))


def _shown(value: Any) -> str:
    if value is None:
        return "missing"
    return "different from layer to layer" if isinstance(value, list) else repr(value)


def _short(value: float) -> float:
    """1e-05 and not 9.999999747378752e-06: the decimal that was stored as a 32-bit float."""
    return float(f"{value:.7g}") if isinstance(value, float) else value


def _refuse_odd_heads(keys: _Keys, head_size: int) -> None:
    for key in ("attention.value_length", "rope.dimension_count"):
        if keys.count(key, head_size) != head_size:
            raise CheckpointError(
                f"{keys.architecture}.{key} is {keys.count(key)} where heads are {head_size} wide: "
                "not supported"
            )


def _end_tokens(header: GGUFHeader) -> list[int]:
    found = [header.metadata.get(f"tokenizer.ggml.{key}") for key in _END_KEYS]
    if odd := [token for token in found if not isinstance(token, int | None)]:
        raise CheckpointError(f"an end token is {odd[0]!r} in the GGUF file, not a number")
    return sorted({token for token in found if token is not None})


def _dtype(tensors: Collection[GGUFTensor]) -> str:
    """What most of the numbers are stored as; quantized blocks unpack to bfloat16.

    Not to float16: it would keep three more bits of each product, but activations of networks
    trained in bfloat16 overflow it.
    """
    numbers: Counter[str] = Counter()
    for tensor in tensors:
        numbers[_STORED_DTYPES.get(tensor.kind.name, "bfloat16")] += math.prod(tensor.shape)
    return numbers.most_common(1)[0][0]


# --------------------------------------------------------------------------- rotary scaling


def _rope_scaling(
    keys: _Keys, theta: float, head_size: int, factors: np.ndarray | None
) -> dict[str, Any] | None:
    if factors is not None:
        return _llama3_scaling(factors, theta, head_size)
    kind = keys.optional("rope.scaling.type")
    if kind is None and keys.optional("rope.scale_linear"):  # files of 2023
        return {"rope_type": "linear", "factor": keys.real("rope.scale_linear", None)}
    if kind in (None, "none"):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": keys.real("rope.scaling.factor", None)}
    if kind == "yarn":
        return _yarn_scaling(keys)
    raise CheckpointError(f"the rotary scaling {kind!r} in the GGUF file is not supported")


def _yarn_scaling(keys: _Keys) -> dict[str, Any]:
    factor = keys.real("rope.scaling.factor", None)
    scaling = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": keys.count("rope.scaling.original_context_length"),
        "beta_fast": keys.real("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": keys.real("rope.scaling.yarn_beta_slow", 1.0),
    }
    if keys.optional("rope.scaling.attn_factor") is not None:  # multiplies what yarn gives
        stated = keys.real("rope.scaling.attn_factor", None)
        scaling["attention_factor"] = stated * (0.1 * math.log(factor) + 1.0)
    return scaling


def _llama3_scaling(factors: np.ndarray, theta: float, head_size: int) -> dict[str, Any] | None:
    """The llama3 parameters behind the divisors that Llama 3.1 and later store in their place.

    The largest divisor is the factor; the original context is found by trying powers of two with
    Llama's own low and high frequency factors, 1 and 4.
    """
    if factors.shape != (head_size // 2,) or not np.isfinite(factors).all():
        raise CheckpointError(f"rope_freqs.weight is misshapen: {list(factors.shape)}")
    if np.allclose(factors, 1.0):
        return None
    factor = _short(float(factors.max()))
    for context in (8192, *(1 << power for power in range(5, 21))):
        if np.allclose(factors, _llama3_divisors(theta, head_size, factor, context), rtol=1e-4):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": context,
            }
    raise CheckpointError("rope_freqs.weight holds a rotary scaling that is not Llama 3's")


def _llama3_divisors(theta: float, head_size: int, factor: float, context: int) -> Sequence[float]:
    divisors = []
    for number in range(0, head_size, 2):
        turns = context / (2 * math.pi * theta ** (number / head_size))  # in the original context
        share = min(max((turns - 1.0) / (4.0 - 1.0), 0.0), 1.0)  # 0: scaled, 1: left alone
        divisors.append(1.0 / ((1.0 - share) / factor + share))
    return divisors
