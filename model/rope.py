"""Rotary position embeddings (Su et al. 2021) with every stretching real checkpoints carry.

Halves convention, as Hugging Face stores Llama: element i of a head turns with element i + D/2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from model.config import RopeConfig


def rotary_table(
    rope: RopeConfig, head_size: int, num_positions: int, trained_positions: int
) -> tuple[Tensor, Tensor]:
    """Cosines and sines, [num_positions, head_size / 2] float32, attention factor included.

    ``dynamic`` scaling depends on a sequence's length in the original; a paged cache keeps keys
    that were turned once, so it is settled here for the longest sequence that will be served
    (nothing changes up to ``trained_positions``).
    """
    frequencies = inverse_frequencies(
        rope, head_size, max(num_positions, trained_positions), trained_positions
    )
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), frequencies)
    return angles.cos() * rope.attention_factor, angles.sin() * rope.attention_factor


def inverse_frequencies(
    rope: RopeConfig, head_size: int, longest: int, trained_positions: int
) -> Tensor:
    """Radians a position, [head_size / 2] float32."""
    theta = rope.theta
    if rope.kind == "dynamic":
        stretch = rope.factor * longest / trained_positions - (rope.factor - 1)
        theta *= stretch ** (head_size / (head_size - 2))
    exponents = torch.arange(0, head_size, 2, dtype=torch.float32) / head_size
    plain = 1.0 / (theta**exponents)
    if rope.kind == "linear":
        return plain / rope.factor
    if rope.kind == "llama3":
        return _llama3(plain, rope)
    if rope.kind == "yarn":
        return _yarn(plain, rope, head_size)
    return plain


def _llama3(plain: Tensor, rope: RopeConfig) -> Tensor:
    """Llama 3.1: slow turns are stretched, fast ones kept, those between blended."""
    lengths = 2 * math.pi / plain
    original = rope.original_max_positions
    spread = rope.high_freq_factor - rope.low_freq_factor
    kept = (original / lengths - rope.low_freq_factor) / spread
    blended = (1 - kept) * plain / rope.factor + kept * plain
    stretched = torch.where(lengths > original / rope.low_freq_factor, plain / rope.factor, blended)
    return torch.where(lengths < original / rope.high_freq_factor, plain, stretched)


def _yarn(plain: Tensor, rope: RopeConfig, head_size: int) -> Tensor:
    """YaRN (Peng et al. 2023): a ramp over the dimensions from kept to stretched."""

    def dimension(turns: float) -> float:
        """Where a pair turns ``turns`` times over the original context."""
        ratio = rope.original_max_positions / (turns * 2 * math.pi)
        return head_size * math.log(ratio) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_size - 1)
    if low == high:
        high += 0.001  # as the reference: no division by zero
    ramp = ((torch.arange(head_size // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return plain / rope.factor * ramp + plain * (1 - ramp)


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Turn [T, heads, D] by [T, 1, D / 2] angles, in float32, back to the dtype of ``x``."""
    first, second = x.float().chunk(2, dim=-1)
    turned = (first * cosines - second * sines, second * cosines + first * sines)
    return torch.cat(turned, dim=-1).to(x.dtype)
