"""Small random networks of transformers: every family and every rotary scaling."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

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

from tests.model.checkpoint.writers import SMALL, random_network

_ROPE = {"rope_theta": 10_000.0, "factor": 4.0}
_OLD = {"original_max_position_embeddings": 32}
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", **_ROPE},
    "dynamic": {"rope_type": "dynamic", **_ROPE},
    "llama3": {
        "rope_type": "llama3",
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        **_ROPE,
        **_OLD,
    },
    "yarn": {"rope_type": "yarn", **_ROPE, **_OLD},
    "yarn-attention-factor": {"rope_type": "yarn", "attention_factor": 0.7, **_ROPE, **_OLD},
    "yarn-mscale": {
        "rope_type": "yarn",
        "mscale": 0.8,
        "mscale_all_dim": 0.4,
        "beta_fast": 20.0,
        "beta_slow": 2.0,
        **_ROPE,
        **_OLD,
    },
    "yarn-smooth-borders": {"rope_type": "yarn", "truncate": False, **_ROPE, **_OLD},
}


def _make(kind: type[PreTrainedModel], config: type[Any], **changes: Any) -> PreTrainedModel:
    return random_network(kind, config(**{**SMALL, **changes}))


_llama = partial(_make, LlamaForCausalLM, LlamaConfig)
_qwen2 = partial(_make, Qwen2ForCausalLM, Qwen2Config)
_qwen3 = partial(_make, Qwen3ForCausalLM, Qwen3Config)
_mistral = partial(_make, MistralForCausalLM, MistralConfig)

_MAKERS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": _llama,
    "llama-tied": partial(_llama, tie_word_embeddings=True),
    "llama-one-kv-head": partial(_llama, num_key_value_heads=1),
    "llama-three-kv-heads": partial(
        _llama, hidden_size=72, num_attention_heads=9, num_key_value_heads=3
    ),
    "llama-all-kv-heads": partial(_llama, num_key_value_heads=4),
    "llama-biases": partial(_llama, attention_bias=True, mlp_bias=True),
    "llama-wide-heads": partial(_llama, head_dim=24),
    "mistral": partial(_mistral, sliding_window=None),
    "mistral-window": partial(_mistral, sliding_window=20),
    "mistral-narrow-window": partial(_mistral, sliding_window=2),
    "qwen2": _qwen2,
    "qwen2-windows": partial(
        _qwen2, use_sliding_window=True, sliding_window=9, max_window_layers=1, num_hidden_layers=3
    ),
    "qwen2-layer-types": partial(
        _qwen2,
        use_sliding_window=True,
        sliding_window=9,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "qwen3": partial(_qwen3, head_dim=32),
    "qwen3-biases-windows": partial(
        _qwen3, attention_bias=True, use_sliding_window=True, sliding_window=9, max_window_layers=0
    ),
    **{f"rope-{name}": partial(_llama, rope_parameters=dict(ROPES[name])) for name in ROPES},
}
NETWORKS = tuple(_MAKERS)


@cache
def network(name: str) -> PreTrainedModel:
    """One of NETWORKS, the same object every time: nobody changes it."""
    return _MAKERS[name]()
