"""Rotary position embeddings and the ways they are stretched over longer contexts.

The frequencies equal those of transformers 5.23 (modeling_rope_utils.py), computed in float32.

Decision: dynamic NTK scaling raises the base with the length of the sequence. A key in a paged
cache may be shared by sequences of any length and is never turned again, so its angle may depend on
its position alone: position p is turned as transformers turns the last token of a sequence of p + 1
tokens. That is equal to transformers for every sequence up to ``max_position_embeddings`` and for
one that grows past it token by token. Only a longer prompt differs: in one forward transformers
turns all of it by its final length, and the tokens after it by theirs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from model.rope_config import RopeConfig


class Rope:
    """Angles of positions; computed once a step and shared by all layers."""

    def __init__(self, config: RopeConfig, head_size: int, device: torch.device) -> None:
        self.config = config
        self.head_size = head_size
        self.frequencies = frequencies(config, head_size).to(device)  # [D / 2] float32
        self._exponents = _exponents(head_size).to(device)

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """[T] -> cosines and sines, each [T, D / 2] float32."""
        turns = positions.float().unsqueeze(-1) * self._frequencies_at(positions)
        cosines, sines = turns.cos(), turns.sin()
        if self.config.attention_factor != 1.0:
            cosines *= self.config.attention_factor
            sines *= self.config.attention_factor
        return cosines, sines

    def _frequencies_at(self, positions: Tensor) -> Tensor:
        if self.config.kind != "dynamic":
            return self.frequencies
        return dynamic_frequencies(self.config, self._exponents, positions + 1)


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """[T, heads, D] by [T, 1, D] each, in float32: element i turns with element i + D / 2.

    ``sines`` are negative in the first half (see ``spread``), so that a roll by half a head stands
    for the two signed swaps.
    """
    wide = x.float()
    return torch.addcmul(wide * cosines, wide.roll(x.size(-1) // 2, -1), sines)


def spread(cosines: Tensor, sines: Tensor) -> tuple[Tensor, Tensor]:
    """The angles of ``Rope.angles`` as ``rotate`` takes them: [T, 1, D] each."""
    return (
        torch.cat((cosines, cosines), -1).unsqueeze(1),
        torch.cat((-sines, sines), -1).unsqueeze(1),
    )


def frequencies(config: RopeConfig, head_size: int) -> Tensor:
    """Radians a position for each of the head's pairs: [D / 2] float32."""
    if config.kind == "linear":
        return _plain(config.theta, head_size) / config.factor
    if config.kind == "yarn":
        return _yarn(config, head_size)
    if config.kind == "llama3":
        return _llama3(config, head_size)
    return _plain(config.theta, head_size)


def _plain(theta: float, head_size: int) -> Tensor:
    return 1.0 / (theta ** _exponents(head_size))


def _exponents(head_size: int) -> Tensor:
    return torch.arange(0, head_size, 2, dtype=torch.float32) / head_size


def dynamic_frequencies(config: RopeConfig, exponents: Tensor, lengths: Tensor) -> Tensor:
    """Of sequences of those lengths: [T] -> [T, D / 2]; ``exponents`` are 0 to 1, one a pair."""
    original, factor, head_size = config.original_positions, config.factor, 2 * len(exponents)
    reach = lengths.clamp(min=original).double()
    growth = (factor * reach / original - (factor - 1)) ** (head_size / (head_size - 2))
    bases = (config.theta * growth).float().unsqueeze(-1)
    return 1.0 / (bases**exponents)


def _yarn(config: RopeConfig, head_size: int) -> Tensor:
    """Fast pairs as they were, slow ones slowed by the factor, a ramp between."""
    wavelengths = config.theta ** _exponents(head_size)
    low, high = (_yarn_border(config, head_size, turns) for turns in _borders(config))
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_size - 1)
    width = high - low if high != low else 0.001
    ramp = ((torch.arange(head_size // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    kept = 1 - ramp
    return 1.0 / (config.factor * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept


def _borders(config: RopeConfig) -> tuple[float, float]:
    return config.beta_fast, config.beta_slow


def _yarn_border(config: RopeConfig, head_size: int, turns: float) -> float:
    """The pair that turns so many times within the original context."""
    wavelength = config.original_positions / (turns * 2 * math.pi)
    return head_size * math.log(wavelength) / (2 * math.log(config.theta))


def _llama3(config: RopeConfig, head_size: int) -> Tensor:
    """Short waves as they were, long ones slowed by the factor, a smooth change between."""
    plain = _plain(config.theta, head_size)
    wavelengths = 2 * math.pi / plain
    longest = config.original_positions / config.low_freq_factor
    shortest = config.original_positions / config.high_freq_factor
    low, high = config.low_freq_factor, config.high_freq_factor
    share = (config.original_positions / wavelengths - low) / (high - low)
    smooth = (1 - share) * plain / config.factor + share * plain
    slowed = torch.where(wavelengths > longest, plain / config.factor, plain)
    is_between = ~(wavelengths < shortest) & ~(wavelengths > longest)
    return torch.where(is_between, smooth, slowed)
