"""The rotary settings of a Hugging Face config, in every spelling found in the wild. No torch.

The old keys are ``rope_theta`` beside ``rope_scaling`` (with ``type`` or ``rope_type``);
transformers 5 writes ``rope_parameters`` with the theta inside.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from model.refusal import Refusal

ROPE_KINDS = ("none", "linear", "dynamic", "yarn", "llama3")
_LARGEST = (1 << 31) - 1
_LARGEST_FACTOR = 10_000.0


class InvalidConfig(Refusal):
    """A value is missing or makes no sense; the message names the key."""


@dataclass(frozen=True)
class RopeConfig:
    """``original_positions`` is the context of the pretraining, before any scaling."""

    kind: str = "none"  # one of ROPE_KINDS
    theta: float = 10_000.0
    factor: float = 1.0
    original_positions: int = 0  # dynamic, yarn, llama3
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0  # multiplies cosines and sines


class Keys:
    """A config's values, checked as they are read. Keys that say null count as absent."""

    def __init__(self, table: Mapping[str, Any]) -> None:
        self._table = table

    def has(self, key: str) -> bool:
        return key in self._table

    def value(self, key: str, default: Any = None) -> Any:
        return self._table.get(key, default)

    def flag(self, key: str) -> bool:
        value = self.value(key)
        if value not in (None, True, False):
            raise InvalidConfig(f"{key} is {value!r}, not true or false")
        return bool(value)

    def count(
        self, key: str, default: int | None = None, *, least: int = 1, limit: int = _LARGEST
    ) -> int:
        value = self._present(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= limit:
            raise InvalidConfig(f"{key} is {value!r}, not a number from {least} to {limit}")
        return value

    def number(
        self,
        key: str,
        default: float | None = None,
        *,
        above: float = 0.0,
        below: float = 1e30,
    ) -> float:
        value = self._present(key, default)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not above < value < below:
            raise InvalidConfig(f"{key} is {value!r}, not a number between {above} and {below}")
        return float(value)

    def token_ids(self, key: str) -> list[int]:
        value = self.value(key)
        found = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(token, int) and not isinstance(token, bool) for token in found):
            raise InvalidConfig(f"{key} is {value!r}, not a token id or a list of them")
        return found

    def table(self, key: str) -> Keys | None:
        value = self.value(key)
        if not value:
            return None
        if not isinstance(value, Mapping):
            raise InvalidConfig(f"{key} is {value!r}, not a table")
        return Keys(value)

    def _present(self, key: str, default: Any) -> Any:
        value = self.value(key)
        value = default if value is None else value
        if value is None:
            raise InvalidConfig(f"the config has no {key}")
        return value


def read_rope(keys: Keys, head_size: int) -> tuple[RopeConfig, int]:
    """The rotary settings and the positions they reach."""
    positions = keys.count("max_position_embeddings", keys.value("max_sequence_length") or 2048)
    scaling = keys.table("rope_scaling") or keys.table("rope_parameters") or Keys({})
    _check_whole_heads(keys, scaling)
    theta = scaling.number("rope_theta", keys.number("rope_theta", 10_000.0, above=1.0), above=1.0)
    kind = _kind(scaling)
    if kind == "none":
        return RopeConfig(theta=theta), positions
    if kind == "linear":
        stated = keys.count("max_sequence_length", positions)
        return RopeConfig(kind, theta, scaling.number("factor")), max(positions, stated)
    if kind == "dynamic":
        if head_size < 4:
            raise InvalidConfig("dynamic rotary scaling needs heads at least 4 wide")
        factor = scaling.number("factor", below=_LARGEST_FACTOR)
        reach = max(positions, int(positions * factor))
        return RopeConfig(kind, theta, factor, original_positions=positions), reach
    if kind == "llama3":
        return _llama3(keys, scaling, theta, positions), positions
    return _yarn(keys, scaling, theta, positions)


def _kind(scaling: Keys) -> str:
    kind = scaling.value("rope_type") or scaling.value("type") or "default"
    kind = "none" if kind == "default" else kind
    if kind not in ROPE_KINDS:
        raise InvalidConfig(
            f"the rotary scaling {kind!r} is not supported; known are {', '.join(ROPE_KINDS)}"
        )
    return str(kind)


def _check_whole_heads(keys: Keys, scaling: Keys) -> None:
    for table in (keys, scaling):
        if table.number("partial_rotary_factor", 1.0) != 1.0:
            raise InvalidConfig("partial_rotary_factor is set: part of a head cannot be rotated")
    if scaling.has("full_attention") or scaling.has("sliding_attention"):
        raise InvalidConfig("rotary settings that differ from layer to layer are not supported")


def _original_positions(keys: Keys, scaling: Keys, positions: int) -> int:
    stated = keys.value("original_max_position_embeddings")
    if stated is not None:
        return keys.count("original_max_position_embeddings")
    return scaling.count("original_max_position_embeddings", positions)


def _llama3(keys: Keys, scaling: Keys, theta: float, positions: int) -> RopeConfig:
    low, high = scaling.number("low_freq_factor"), scaling.number("high_freq_factor")
    if low == high:
        raise InvalidConfig("low_freq_factor and high_freq_factor are equal")
    return RopeConfig(
        "llama3",
        theta,
        scaling.number("factor"),
        original_positions=_original_positions(keys, scaling, positions),
        low_freq_factor=low,
        high_freq_factor=high,
    )


def _yarn(keys: Keys, scaling: Keys, theta: float, positions: int) -> tuple[RopeConfig, int]:
    original = _original_positions(keys, scaling, positions)
    if scaling.has("factor") and scaling.value("factor") is None:
        factor = positions / original
    else:
        factor = scaling.number("factor", below=_LARGEST_FACTOR)
    rope = RopeConfig(
        "yarn",
        theta,
        factor,
        original_positions=original,
        beta_fast=scaling.number("beta_fast", 32.0),
        beta_slow=scaling.number("beta_slow", 1.0),
        truncate=scaling.value("truncate") is not False,
        attention_factor=_yarn_attention_factor(scaling, factor),
    )
    is_stated = keys.has("original_max_position_embeddings") or scaling.has(
        "original_max_position_embeddings"
    )
    return rope, max(positions, int(original * factor)) if is_stated else positions


def _yarn_attention_factor(scaling: Keys, factor: float) -> float:
    """As the YaRN paper has it, or DeepSeek's quotient where both of its scales are given."""
    if scaling.value("attention_factor") is not None:
        return scaling.number("attention_factor")
    if scaling.value("mscale") and scaling.value("mscale_all_dim"):
        numerator = _magnitude(factor, scaling.number("mscale"))
        return numerator / _magnitude(factor, scaling.number("mscale_all_dim"))
    return _magnitude(factor, 1.0)


def _magnitude(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0
