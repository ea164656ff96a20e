"""params.json of Meta's layout, read as a Hugging Face config. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.checkpoint.documents import read_json
from model.checkpoint.errors import CheckpointError

# Keys of networks that are no plain Llama.
_FOREIGN = {
    "moe": "a mixture of experts",
    "moe_args": "a mixture of experts",
    "vision_args": "a vision model",
    "vision_chunk_size": "a vision model",
    "vision_encoder": "a vision model",
    "vision_num_cross_attention_layers": "a vision model",
    "quantization_args": "a quantized model",
    "lora_args": "a model with adapters",
}
_LLAMA_3_VOCABULARY = 128_256
_LLAMA_3_BOS, _LLAMA_3_ENDS = 128_000, [128_001, 128_008, 128_009]  # end of text, eom, eot
_LLAMA_3_2_WIDTHS = (2048, 3072)  # 1B and 3B: scaled by 32, which params.json does not say


@dataclass(frozen=True)
class MetaParams:
    """The numbers of params.json that shape the network."""

    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    feed_forward: int
    vocab_size: int | None  # None: the embedding says
    document: dict[str, Any]

    @property
    def kv_width(self) -> int:
        return self.num_kv_heads * self.head_size

    def huggingface_config(self, vocab_size: int, dtype: str) -> dict[str, Any]:
        """``vocab_size``: rows of the embedding, used where params.json says -1."""
        document = self.document
        is_llama_3 = (self.vocab_size or vocab_size) == _LLAMA_3_VOCABULARY
        window = document.get("sliding_window")
        return {
            "architectures": ["MistralForCausalLM" if window else "LlamaForCausalLM"],
            "model_type": "mistral" if window else "llama",
            "hidden_act": "silu",
            "vocab_size": self.vocab_size or vocab_size,
            "hidden_size": self.width,
            "intermediate_size": self.feed_forward,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_size,
            "max_position_embeddings": self._max_positions(is_llama_3),
            "rms_norm_eps": document.get("norm_eps") or 1e-5,
            "rope_theta": document.get("rope_theta") or 10_000.0,
            "rope_scaling": self._rope_scaling(),
            "sliding_window": window,
            "tie_word_embeddings": True,  # undone where output.weight differs
            "bos_token_id": _LLAMA_3_BOS if is_llama_3 else 1,
            "eos_token_id": _LLAMA_3_ENDS if is_llama_3 else 2,
            "torch_dtype": dtype,
        }

    def _max_positions(self, is_llama_3: bool) -> int:
        """params.json does not say what the model was trained for; the generation does."""
        if stated := self.document.get("max_seq_len"):
            return int(stated)
        if self.document.get("use_scaled_rope"):
            return 131_072
        if is_llama_3:
            return 8_192
        if self.document.get("rope_theta") == 1e6:  # Code Llama
            return 16_384
        return 2_048 if self.document.get("norm_eps") == 1e-6 else 4_096  # Llama 1, Llama 2

    def _rope_scaling(self) -> dict[str, Any] | None:
        if not self.document.get("use_scaled_rope"):
            return None
        factor = 32.0 if self.width in _LLAMA_3_2_WIDTHS else 8.0
        return {
            "rope_type": "llama3",
            "factor": self.document.get("rope_scaling_factor", factor),
            "low_freq_factor": 1.0,
            "high_freq_factor": self.document.get("high_freq_factor", 4.0),
            "original_max_position_embeddings": 8_192,
        }


def read_params(path: Path) -> MetaParams:
    document = read_json(path)
    for key, what in _FOREIGN.items():
        if document.get(key):
            raise CheckpointError(f"params.json describes {what} ({key}), which is not supported")
    width, num_heads = _count(document, "dim"), _count(document, "n_heads")
    return MetaParams(
        width=width,
        num_layers=_count(document, "n_layers"),
        num_heads=num_heads,
        num_kv_heads=_count(document, "n_kv_heads", num_heads),
        head_size=_count(document, "head_dim", max(width // num_heads, 1)),
        feed_forward=_count(document, "hidden_dim", _feed_forward(document, width)),
        vocab_size=None if document.get("vocab_size", -1) == -1 else _count(document, "vocab_size"),
        document=document,
    )


def _count(document: dict[str, Any], key: str, default: int | None = None) -> int:
    value = document.get(key)
    if value is None:
        value = default
    if not isinstance(value, int) or not 0 < value < 1 << 31:
        raise CheckpointError(f"params.json: {key} is {value!r}, not a positive number")
    return value


def _feed_forward(document: dict[str, Any], width: int) -> int:
    """Two thirds of four times the width, stretched, rounded up: llama-models, FeedForward."""
    hidden = int(2 * (4 * width) / 3)
    multiplier = document.get("ffn_dim_multiplier")
    if multiplier is not None:
        if not isinstance(multiplier, int | float) or not 0 < multiplier < 1e6:
            raise CheckpointError(f"params.json: ffn_dim_multiplier is {multiplier!r}")
        hidden = int(multiplier * hidden)
    multiple = _count(document, "multiple_of", 256)
    return -(-hidden // multiple) * multiple
