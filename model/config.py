"""What a checkpoint says of its network, checked and put in pronk's own terms.

One door: ``ModelConfig.from_huggingface``. The loaders of other formats translate into that shape.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

KNOWN_ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
)
ROPE_KINDS = ("none", "linear", "dynamic", "yarn", "llama3")
DTYPES = ("float32", "bfloat16", "float16")
MAX_SIZE = 1 << 24  # a dimension past it is a damaged file, not a model


class InvalidConfig(ValueError):
    """The configuration is damaged or asks for what no Llama does; the text names the key."""


class UnsupportedModel(ValueError):
    """An architecture pronk does not know, refused by name with the list of those it knows."""


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position: the base and how it is stretched past the context it was trained on."""

    kind: str = "none"
    theta: float = 10000.0
    factor: float = 1.0
    original_max_positions: int = 0  # yarn, llama3: the context before stretching
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    attention_factor: float = 1.0  # yarn: scales cosines and sines
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: whole dimensions bound the ramp


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a Llama-family network. ``norm_eps`` is added to a variance."""

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
    windows: tuple[int | None, ...]  # sliding window of each layer, None: full attention
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    dtype: str  # the checkpoint's own

    @classmethod
    def from_huggingface(
        cls, config: Mapping[str, Any], generation_config: Mapping[str, Any] | None = None
    ) -> ModelConfig:
        """Read ``config.json`` (and ``generation_config.json``, which may know more end tokens).

        Raises ``UnsupportedModel`` for an architecture pronk does not know, ``InvalidConfig`` for
        a value that is missing or makes no sense.
        """
        architecture = _architecture(config)
        read = _Reader(config)
        heads = read.size("num_attention_heads")
        hidden = read.size("hidden_size")
        head_size = _head_size(read, hidden, heads)
        num_layers = read.size("num_hidden_layers")
        kv_heads = read.size("num_key_value_heads", heads)
        if heads % kv_heads:
            raise InvalidConfig(f"{heads} query heads do not divide over {kv_heads} kv heads")
        if (act := config.get("hidden_act", "silu")) not in ("silu", "swish"):
            raise InvalidConfig(f"hidden_act is {act!r}: only silu is a Llama's")
        max_positions = read.size("max_position_embeddings", 2048)
        attention_bias = bool(config.get("attention_bias", False))
        is_qwen2 = architecture == "Qwen2ForCausalLM"
        return cls(
            architecture=architecture,
            vocab_size=read.size("vocab_size"),
            hidden_size=hidden,
            intermediate_size=read.size("intermediate_size"),
            num_layers=num_layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_size=head_size,
            max_positions=max_positions,
            norm_eps=read.number("rms_norm_eps", 1e-6),
            rope=_rope(config, max_positions),
            tie_embeddings=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=attention_bias or is_qwen2,
            output_bias=attention_bias and not is_qwen2,
            mlp_bias=bool(config.get("mlp_bias", False)),
            qk_norm=architecture == "Qwen3ForCausalLM",
            windows=_windows(architecture, config, num_layers),
            bos_token_id=_first_id(config.get("bos_token_id")),
            eos_token_ids=_end_ids(config, generation_config or {}),
            dtype=_dtype(config),
        )


class _Reader:
    """Reads numbers and says which key was wrong."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config

    def size(self, key: str, default: int | None = None) -> int:
        value = self._config.get(key)
        if value is None:
            value = default
        if value is None:
            raise InvalidConfig(f"the config has no {key}")
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= MAX_SIZE:
            raise InvalidConfig(f"{key} is {value!r}: a count from 1 to {MAX_SIZE} is needed")
        return value

    def number(self, key: str, default: float) -> float:
        value = self._config.get(key)
        return default if value is None else _positive(key, value)


def _positive(key: str, value: object) -> float:
    good = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not good or not math.isfinite(value) or value <= 0:  # type: ignore[arg-type, operator]
        raise InvalidConfig(f"{key} is {value!r}: a positive number is needed")
    return float(value)  # type: ignore[arg-type]


def _architecture(config: Mapping[str, Any]) -> str:
    named = config.get("architectures") or []
    name = named[0] if isinstance(named, list) and named else None
    if name is None:
        kinds = {"llama": 0, "mistral": 1, "qwen2": 2, "qwen3": 3}
        kind = config.get("model_type")
        name = KNOWN_ARCHITECTURES[kinds[kind]] if kind in kinds else f"model_type {kind!r}"
    if name not in KNOWN_ARCHITECTURES:
        known = ", ".join(KNOWN_ARCHITECTURES)
        raise UnsupportedModel(f"{name} is not a model pronk can run; it runs {known}")
    return str(name)


def _head_size(read: _Reader, hidden: int, heads: int) -> int:
    size = read.size("head_dim", max(1, hidden // heads))
    if size % 2:
        raise InvalidConfig(f"a head size of {size} is odd: rotary positions turn pairs")
    return size


def _windows(
    architecture: str, config: Mapping[str, Any], num_layers: int
) -> tuple[int | None, ...]:
    window = config.get("sliding_window")
    if architecture == "LlamaForCausalLM" or window is None:
        return (None,) * num_layers
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise InvalidConfig(f"sliding_window is {window!r}: a count of tokens is needed")
    if architecture == "MistralForCausalLM":
        return (window,) * num_layers
    if not config.get("use_sliding_window", False):
        return (None,) * num_layers
    if kinds := config.get("layer_types"):
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    first = config.get("max_window_layers", 28)
    return tuple(window if layer >= first else None for layer in range(num_layers))


def _rope(config: Mapping[str, Any], max_positions: int) -> RopeConfig:
    """Both the old ``rope_scaling`` + ``rope_theta`` and transformers 5's ``rope_parameters``."""
    said = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(said, Mapping):
        raise InvalidConfig(f"rope_scaling is {said!r}: an object is needed")
    theta = _positive("rope_theta", said.get("rope_theta", config.get("rope_theta", 10000.0)))
    kind = said.get("rope_type", said.get("type", "default"))
    kind = "none" if kind in ("default", "none", None) else kind
    if kind not in ROPE_KINDS:
        raise InvalidConfig(f"rope type {kind!r} is not known; pronk has {', '.join(ROPE_KINDS)}")
    if (
        said.get("partial_rotary_factor", 1.0) != 1.0
        or config.get("partial_rotary_factor", 1.0) != 1.0
    ):
        raise InvalidConfig("partial rotary embeddings are not a Llama's")
    if kind == "none":
        return RopeConfig(theta=theta)
    original = said.get("original_max_position_embeddings") or max_positions
    factor = said.get("factor")
    if factor is None and kind == "yarn":
        factor = max_positions / original
    factor = _positive("rope_scaling.factor", factor)
    return RopeConfig(
        kind=kind,
        theta=theta,
        factor=factor,
        original_max_positions=int(_positive("original_max_position_embeddings", original)),
        low_freq_factor=_positive("low_freq_factor", said.get("low_freq_factor", 1.0)),
        high_freq_factor=_positive("high_freq_factor", said.get("high_freq_factor", 4.0)),
        attention_factor=_attention_factor(said, factor) if kind == "yarn" else 1.0,
        beta_fast=_positive("beta_fast", said.get("beta_fast") or 32.0),
        beta_slow=_positive("beta_slow", said.get("beta_slow") or 1.0),
        truncate=bool(said.get("truncate", True)),
    )


def _attention_factor(said: Mapping[str, Any], factor: float) -> float:
    """YaRN's temperature on attention (Peng et al. 2023, section 3.4), by mscale where given."""
    if (given := said.get("attention_factor")) is not None:
        return _positive("attention_factor", given)

    def grown(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    mscale, all_dim = said.get("mscale"), said.get("mscale_all_dim")
    if mscale and all_dim:
        return grown(mscale) / grown(all_dim)
    return grown(1.0)


def _ids(value: object) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [item for item in values if isinstance(item, int) and not isinstance(item, bool)]


def _first_id(value: object) -> int | None:
    return next(iter(_ids(value)), None)


def _end_ids(config: Mapping[str, Any], generation: Mapping[str, Any]) -> tuple[int, ...]:
    found = [*_ids(config.get("eos_token_id")), *_ids(generation.get("eos_token_id"))]
    return tuple(dict.fromkeys(found))


def _dtype(config: Mapping[str, Any]) -> str:
    named = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix(
        "torch."
    )
    return named if named in DTYPES else "float32"
