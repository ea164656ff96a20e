"""Uniforms that are a function of (seed, choice, position) and of nothing else.

No generator state exists: after preemption, restart or replay, alone or in a batch, on any device
the same triple gives the same number. The mixer is SplitMix64's finaliser (Steele, Lea and Flood,
"Fast splittable pseudorandom number generators", 2014), applied once per coordinate.
"""

from __future__ import annotations

_MASK = (1 << 64) - 1
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15
_BITS = 48  # fewer than a double's 53, so that ``u * total`` never rounds up to ``total``


def uniform(seed: int, choice: int, position: int) -> float:
    """A float in [0, 1) with 48 random bits. Any integers are welcome, negative ones included."""
    state = 0
    for coordinate in (seed, choice, position):
        state = _mix((state ^ coordinate) + _GOLDEN_GAMMA)
    return float((state >> (64 - _BITS)) / (1 << _BITS))


def _mix(value: int) -> int:
    value &= _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
