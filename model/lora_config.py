"""adapter_config.json of a PEFT folder: which modules it adapts and how strongly. Imports no torch.

What changes the arithmetic and is not served is refused by name. Patterns come from strangers, so
none is run that could take long: a regular expression in ``target_modules`` is not run at all (the
tensors say what they adapt), keys of ``rank_pattern`` and ``alpha_pattern`` are names or nearly so.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from model.checkpoint.errors import CheckpointError, some_names

__all__ = ["AdapterError", "AdapterNotFound", "LoraConfig"]

MAX_PATTERNS = 4096  # keys of one pattern table; PEFT writes one a module at most
MAX_WILD = 16  # of them with a wildcard
DEFAULT_RANK = DEFAULT_ALPHA = 8  # PEFT's

# A name, an escaped or plain dot, and up to two wildcards: cheap to match whatever stands there.
_NEARLY_A_NAME = re.compile(r"\^?(?:\.\*|\\d\+|\[0-9\]\+|\\?\.|[\w-])+\$?")
_WILD = re.compile(r"\.\*|\\d\+|\[0-9\]\+")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")

# field: why what it asks for is not plain LoRA; any value that is not false, null or empty
_REFUSED = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "lora_bias": "biases beside lora_B",
    "modules_to_save": "modules trained in full (modules_to_save)",
    "trainable_token_indices": "retrained tokens (trainable_token_indices)",
    "target_parameters": "adapted parameters (target_parameters)",
    "layer_replication": "replicated layers (layer_replication)",
    "alora_invocation_tokens": "activated LoRA (alora_invocation_tokens)",
}
_HARMLESS = {"use_rslora", "eva_config", "runtime_config"}
# Their first step changes the base weights, so that the adapter alone says nothing.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


class AdapterError(CheckpointError):
    """The adapter cannot be served; the message says in one line what is wrong."""


class AdapterNotFound(AdapterError):
    """There is no adapter in that folder."""


Matcher: TypeAlias = Callable[[str], bool]


@dataclass(frozen=True)
class PatternTable:
    """``rank_pattern`` or ``alpha_pattern``: the first key that fits a module gives its value."""

    entries: tuple[tuple[Matcher, float], ...]

    def value(self, module: str, default: float) -> float:
        return next((value for fits, value in self.entries if fits(module)), default)


@dataclass(frozen=True)
class LoraConfig:
    """``targets`` is None where the tensors alone say what they adapt."""

    rank: int
    alpha: float
    is_rank_stabilized: bool
    targets: tuple[str, ...] | None
    excluded: tuple[str, ...]
    layers: frozenset[int] | None
    ranks: PatternTable
    alphas: PatternTable

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> LoraConfig:
        """Raises AdapterError for what is not plain LoRA, or no config of it."""
        _refuse_strangers(config)
        targets, excluded = _targets(config), _excluded(config)
        return cls(
            rank=_count(config.get("r", DEFAULT_RANK), "r"),
            alpha=_number(config.get("lora_alpha", DEFAULT_ALPHA), "lora_alpha"),
            is_rank_stabilized=bool(config.get("use_rslora")),
            targets=None if excluded is None else targets,
            excluded=excluded or (),
            layers=_layers(config.get("layers_to_transform")),
            ranks=_pattern_table(config, "rank_pattern", _count),
            alphas=_pattern_table(config, "alpha_pattern", _number),
        )

    def rank_of(self, module: str) -> int:
        return int(self.ranks.value(module, self.rank))

    def scale_of(self, module: str) -> float:
        """What B A is multiplied by before it is added to the weight."""
        alpha, rank = self.alphas.value(module, self.alpha), self.rank_of(module)
        return alpha / math.sqrt(rank) if self.is_rank_stabilized else alpha / rank

    def names(self, modules: Iterable[str]) -> set[str] | None:
        """Those of ``modules`` it adapts; None where only its tensors say."""
        if self.targets is None:
            return None
        return {module for module in modules if self._adapts(module, self.targets)}

    def _adapts(self, module: str, targets: tuple[str, ...]) -> bool:
        if any(_is_named(module, name) for name in self.excluded):
            return False
        if module in targets:
            return True
        layer = _LAYER.match(module)
        if self.layers is not None and (layer is None or int(layer[1]) not in self.layers):
            return False
        return ALL_LINEAR in targets or any(_is_named(module, name) for name in targets)


ALL_LINEAR = "all-linear"


def _is_named(module: str, name: str) -> bool:
    return module == name or module.endswith(f".{name}")


def _refuse_strangers(config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise AdapterError(f"peft_type is {_shown(kind)}: only LORA is supported")
    for name, value in config.items():
        if not value or name in _HARMLESS:
            continue
        is_other = name.startswith("use_") or name.endswith("_config")
        if name in _REFUSED or is_other:
            what = _REFUSED.get(name, _shown(name))
            raise AdapterError(f"the adapter uses {what}, which is not supported")
    if (bias := config.get("bias", "none")) != "none":
        raise AdapterError(f"the adapter trains biases (bias is {_shown(bias)}), not supported")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise AdapterError(
            f"the adapter starts from changed base weights (init_lora_weights is {_shown(start)}): "
            "save it converted to plain LoRA"
        )


def _targets(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    targets = config.get("target_modules")
    if isinstance(targets, str):
        return (ALL_LINEAR,) if targets.lower() == ALL_LINEAR else None  # else an expression
    if targets is None:
        return None
    return _names(targets, "target_modules")


def _excluded(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """None where it is an expression."""
    excluded = config.get("exclude_modules")
    if isinstance(excluded, str) and excluded:
        return None
    return _names(excluded or [], "exclude_modules")


def _names(value: Any, field: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise AdapterError(f"{field} is neither a list of names nor an expression")
    if len(value) > MAX_PATTERNS:
        raise AdapterError(f"{field} holds {len(value)} names, at most {MAX_PATTERNS} are read")
    return tuple(value)


def _layers(value: Any) -> frozenset[int] | None:
    if value is None or value == []:
        return None
    numbers = value if isinstance(value, list) else [value]
    if not all(isinstance(number, int) and not isinstance(number, bool) for number in numbers):
        raise AdapterError("layers_to_transform holds something else than layer numbers")
    return frozenset(numbers)


def _pattern_table(
    config: Mapping[str, Any], field: str, read: Callable[[Any, str], float]
) -> PatternTable:
    table = config.get(field) or {}
    if not isinstance(table, dict) or len(table) > MAX_PATTERNS:
        raise AdapterError(f"{field} is no table of at most {MAX_PATTERNS} modules")
    wild = [key for key in table if _WILD.search(key)]
    odd = [key for key in table if not _NEARLY_A_NAME.fullmatch(key)]
    odd += [key for key in wild if len(_WILD.findall(key)) > 2]
    if odd or len(wild) > MAX_WILD:
        raise AdapterError(
            f"{field} has keys that are more than module names ({_shown(some_names(odd or wild))})"
        )
    return PatternTable(
        tuple((_matcher(key), read(value, f"{field}[{key}]")) for key, value in table.items())
    )


def _matcher(key: str) -> Matcher:
    """As PEFT matches: the whole name, or its end after a dot."""
    if _WILD.search(key) or key.startswith("^"):
        expression = re.compile(rf"(?:.*\.)?(?:{key})$")
        return lambda module: expression.match(module) is not None
    name = key.removesuffix("$").replace("\\.", ".")
    return lambda module: _is_named(module, name)


def _count(value: Any, field: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise AdapterError(
            f"{_shown(field)[1:-1]} is {_shown(value)}: a whole number from 1 is needed"
        )
    return value


def _number(value: Any, field: str) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not abs(value) < 1e9:  # also what is no number
        raise AdapterError(f"{_shown(field)[1:-1]} is {_shown(value)}: a number is needed")
    return float(value)


def _shown(value: Any) -> str:
    """Of a stranger's file, in an error: short and on one line."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
