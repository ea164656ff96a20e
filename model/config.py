"""What a network is made of, read from a Hugging Face config. Imports no torch.

The other formats' loaders translate what they find into the same keys and come through the same
door, ``ModelConfig.from_huggingface``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from model.refusal import Refusal
from model.rope_config import InvalidConfig, Keys, RopeConfig, read_rope

__all__ = ["InvalidConfig", "ModelConfig", "RopeConfig", "UnsupportedModel"]

_MODEL_TYPES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_ALIASES = {"LLaMAForCausalLM": "LlamaForCausalLM"}  # conversions from before transformers 4.28
ARCHITECTURES = tuple(_MODEL_TYPES.values())

_MAX_LAYERS = 1 << 24
_DTYPES = ("float32", "bfloat16", "float16")
_MISTRAL_WINDOW = 4096  # transformers' default where the key is absent; null is none
_DEFAULT_IDS = {"bos_token_id": 1, "eos_token_id": 2}  # likewise, of Llama and Mistral


class UnsupportedModel(Refusal):
    """The architecture is not one of those known; the message names both."""


@dataclass(frozen=True)
class ModelConfig:
    """A decoder of the Llama family. ``windows`` holds one entry a layer; None sees everything.

    A window w lets a token see itself and the w - 1 before it. ``max_positions`` is how far the
    network was made to reach, rotary scaling included.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    max_positions: int
    norm_eps: float
    rope: RopeConfig
    tie_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int | None, ...]
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    dtype: str

    @classmethod
    def from_huggingface(
        cls, config: Mapping[str, Any], generation_config: Mapping[str, Any] | None = None
    ) -> ModelConfig:
        """Raises UnsupportedModel for a foreign architecture, InvalidConfig for odd values."""
        if not isinstance(config, Mapping):
            raise InvalidConfig(f"the config is a {type(config).__name__}, not a table")
        architecture = _architecture(config)
        keys = Keys(config)
        _check_activation(keys)
        num_heads, hidden = keys.count("num_attention_heads"), keys.count("hidden_size")
        num_kv_heads = keys.count("num_key_value_heads", num_heads)
        if num_heads % num_kv_heads:
            raise InvalidConfig(f"{num_heads} heads cannot share {num_kv_heads} key heads evenly")
        head_size = _head_size(keys, hidden, num_heads, architecture)
        num_layers = keys.count("num_hidden_layers", limit=_MAX_LAYERS)
        vocab_size = keys.count("vocab_size")
        rope, max_positions = read_rope(keys, head_size)
        qkv_bias, output_bias, mlp_bias = _biases(keys, architecture)
        bos, eos = _special_ids(keys, generation_config, architecture, vocab_size)
        return cls(
            architecture=architecture,
            vocab_size=vocab_size,
            hidden_size=hidden,
            intermediate_size=keys.count("intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_size=head_size,
            max_positions=max_positions,
            norm_eps=keys.number("rms_norm_eps", 1e-6, above=0.0, below=1.0),
            rope=rope,
            tie_embeddings=keys.flag("tie_word_embeddings"),
            qkv_bias=qkv_bias,
            output_bias=output_bias,
            mlp_bias=mlp_bias,
            qk_norm=architecture == "Qwen3ForCausalLM",
            windows=_windows(keys, architecture, num_layers),
            bos_token_id=bos,
            eos_token_ids=eos,
            dtype=_dtype(keys),
        )


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures") or [_MODEL_TYPES.get(str(config.get("model_type")))]
    name = names[0] if isinstance(names, list) and names else None
    if name is None and config.get("model_type"):
        name = f"model type {config['model_type']}"
    if not isinstance(name, str):
        raise InvalidConfig("the config names no architecture")
    name = _ALIASES.get(name, name)
    if name not in ARCHITECTURES:
        raise UnsupportedModel(
            f"the architecture {name} is not supported; known are {', '.join(ARCHITECTURES)}"
        )
    return name


def _check_activation(keys: Keys) -> None:
    activation = keys.value("hidden_act") or "silu"
    if activation not in ("silu", "swish"):
        raise InvalidConfig(f"hidden_act is {activation!r}: networks of this family use silu")
    if keys.value("num_local_experts") or keys.value("num_experts"):
        raise UnsupportedModel(
            "mixtures of experts are not supported; known are " + ", ".join(ARCHITECTURES)
        )


def _head_size(keys: Keys, hidden: int, num_heads: int, architecture: str) -> int:
    if keys.value("head_dim") is None and architecture == "Qwen3ForCausalLM":
        return 128  # transformers' default
    if keys.value("head_dim") is None and hidden % num_heads:
        raise InvalidConfig(f"hidden_size {hidden} is no multiple of {num_heads} heads")
    size = keys.count("head_dim", max(hidden // num_heads, 1))
    if size % 2:
        raise InvalidConfig(f"heads are {size} wide: rotary embeddings turn pairs, so it is even")
    return size


def _biases(keys: Keys, architecture: str) -> tuple[bool, bool, bool]:
    """(q, k and v; o; MLP), as transformers builds each family."""
    if architecture == "Qwen2ForCausalLM":
        return True, False, False
    if architecture == "MistralForCausalLM":
        return False, False, False
    attention = keys.flag("attention_bias")
    return attention, attention, architecture == "LlamaForCausalLM" and keys.flag("mlp_bias")


def _windows(keys: Keys, architecture: str, num_layers: int) -> tuple[int | None, ...]:
    if architecture == "LlamaForCausalLM":
        return (None,) * num_layers
    if architecture == "MistralForCausalLM":
        window = keys.value("sliding_window", _MISTRAL_WINDOW)
        return (None if window is None else keys.count("sliding_window", window),) * num_layers
    if not keys.flag("use_sliding_window") or keys.value("sliding_window", 4096) is None:
        return (None,) * num_layers
    window = keys.count("sliding_window", 4096)
    return tuple(window if slides else None for slides in _sliding_layers(keys, num_layers))


def _sliding_layers(keys: Keys, num_layers: int) -> list[bool]:
    """Qwen's: the layers named so, or those from ``max_window_layers`` on."""
    types = keys.value("layer_types")
    if types is None:
        first = keys.count("max_window_layers", 28, least=0)
        return [layer >= first for layer in range(num_layers)]
    known = {"sliding_attention": True, "full_attention": False}
    if not isinstance(types, list) or len(types) != num_layers:
        raise InvalidConfig(f"layer_types does not name {num_layers} layers")
    for kind in types:
        if not isinstance(kind, str) or kind not in known:
            raise InvalidConfig(f"layer_types names {kind!r}, which is not supported")
    return [known[kind] for kind in types]


def _special_ids(
    keys: Keys, generation_config: Mapping[str, Any] | None, architecture: str, vocab_size: int
) -> tuple[int | None, tuple[int, ...]]:
    """The begin token, and every end token either file names, in that order."""
    has_defaults = architecture in ("LlamaForCausalLM", "MistralForCausalLM")
    files = [keys, Keys(generation_config or {})]

    def stated(name: str) -> list[int]:
        found = [token for file in files for token in file.token_ids(name)]
        if not found and has_defaults and not any(file.has(name) for file in files):
            found = [_DEFAULT_IDS[name]]
        return [token for token in dict.fromkeys(found) if 0 <= token < vocab_size]

    return next(iter(stated("bos_token_id")), None), tuple(stated("eos_token_id"))


def _dtype(keys: Keys) -> str:
    stated = keys.value("dtype") or keys.value("torch_dtype") or "float32"
    name = str(stated).removeprefix("torch.")
    if name not in _DTYPES:
        raise InvalidConfig(f"dtype is {name!r}: one of {', '.join(_DTYPES)} is needed")
    return name
