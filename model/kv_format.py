"""In which numbers keys and values lie in their pages, and how they become the model's again.

``fp8`` is e4m3 with scale 1: relative error at most 1/16, values beyond 448 are cut there. ``int8``
has a float32 scale for every token of every key head, its largest entry over 127: no entry is off
by more than half a scale. Neither ever holds what is no number: it is stored as 0, because whoever
gets the page next must be able to mask it. The row that wrote it fails by its residual stream.
"""

# N pages, K key heads, P tokens a page, D head size

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

KV_CACHE_DTYPES: dict[str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "fp8": torch.float8_e4m3fn,
    "int8": torch.int8,
}
FP8_LARGEST = 448.0
INT8_LARGEST = 127.0
_LARGEST_SCALE = 2e36  # times 127 still a float32


class UnknownCacheFormat(ValueError):
    """There is no such number format for the cache."""


def cache_format(name: str, model_dtype: torch.dtype) -> torch.dtype:
    """``auto`` is the model's own. Raises UnknownCacheFormat."""
    if name == "auto":
        return model_dtype
    if name not in KV_CACHE_DTYPES:
        known = ", ".join(["auto", *KV_CACHE_DTYPES])
        raise UnknownCacheFormat(f"KV cache dtype {name!r}: one of {known} is meant")
    return KV_CACHE_DTYPES[name]


def format_name(dtype: torch.dtype) -> str:
    """As ``--kv-cache-dtype`` spells it."""
    return next(name for name, known in KV_CACHE_DTYPES.items() if known == dtype)


def is_quantized(dtype: torch.dtype) -> bool:
    return dtype in (torch.float8_e4m3fn, torch.int8)


def scale_bytes(dtype: torch.dtype) -> int:
    """Beside each token of each key head."""
    return 4 if dtype == torch.int8 else 0


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """[..., D] -> the same in ``dtype``, and for int8 the scales [...] float32."""
    if dtype == torch.int8:
        return _to_int8(x)
    if dtype == torch.float8_e4m3fn:
        largest = FP8_LARGEST
        return x.nan_to_num(0.0).clamp_(-largest, largest).to(dtype), None
    return x.to(dtype), None


def _to_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    wide = x.float().nan_to_num(0.0)
    scales = (wide.abs().amax(-1) / INT8_LARGEST).clamp_(max=_LARGEST_SCALE)
    divisors = torch.where(scales > 0, scales, 1.0).unsqueeze(-1)  # all zeros: stay zeros
    # Clamped for scales so small that they are rounded themselves, or so large that they are cut.
    return (wide / divisors).round_().clamp_(-INT8_LARGEST, INT8_LARGEST).to(torch.int8), scales


def dequantize(stored: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[..., D] and for int8 scales [...] -> [..., D] in ``dtype``."""
    if scales is None:
        return widen(stored, dtype)
    return (stored.float() * scales.unsqueeze(-1)).to(dtype)


def widen(stored: Tensor, dtype: torch.dtype) -> Tensor:
    """The stored numbers as they are, without scales: exact for fp8 and int8."""
    is_on_cpu = stored.device.type == "cpu"
    if stored.dtype == torch.float8_e4m3fn and is_on_cpu and dtype in _FP8_MOVES:
        return _widen_fp8(stored, dtype)
    return stored.to(dtype)


# For each dtype: integers of its width, how far e4m3's seven bits move up to lie in its exponent
# and mantissa, and a mask of those and the sign.
_FP8_MOVES = {
    torch.bfloat16: (torch.int16, 4, -0x7810),
    torch.float32: (torch.int32, 20, -0x78100000),
}
_FP8_BIAS = 2.0**120  # exponents count from 7 in e4m3, from 127 in the others


def _widen_fp8(stored: Tensor, dtype: torch.dtype) -> Tensor:
    """Bits moved to their places: PyTorch's own conversion on processors takes eleven times as
    long (0.5 against 5.5 billion a second into bfloat16). NaN, which is never stored, is lost."""
    integers, places, mask = _FP8_MOVES[dtype]
    bits = stored.view(torch.int8).to(integers)
    return bits.bitwise_left_shift_(places).bitwise_and_(mask).view(dtype).mul_(_FP8_BIAS)


@dataclass(frozen=True, slots=True)
class Pages:
    """Keys or values of one layer as they lie, [N, K, P, D], to be read in ``dtype``.

    ``scales`` [N, K, P] float32 belong to int8 pages.
    """

    stored: Tensor
    scales: Tensor | None
    dtype: torch.dtype

    @property
    def num_heads(self) -> int:
        return self.stored.size(1)

    @property
    def size(self) -> int:
        return self.stored.size(2)

    @property
    def is_as_read(self) -> bool:
        """Whether pages can be read where they lie."""
        return self.stored.dtype == self.dtype

    @property
    def bytes_as_read(self) -> int:
        """Of one page, once it is in ``dtype``."""
        return self.stored[0].numel() * self.dtype.itemsize

    def heads(self, some: slice) -> Pages:
        scales = None if self.scales is None else self.scales[:, some]
        return Pages(self.stored[:, some], scales, self.dtype)

    def unscaled(self, which: slice | Tensor) -> tuple[Tensor, Tensor | None]:
        """[n, K, P, D] and what each token's entries are yet to be multiplied by, [n, K, P].

        A slice of pages that are in ``dtype`` already is a view.
        """
        stored = _select(self.stored, which)
        scales = None if self.scales is None else _select(self.scales, which)
        return widen(stored, self.dtype), scales

    def read(self, which: slice | Tensor) -> Tensor:
        """[n, K, P, D]; a slice of pages that are in ``dtype`` already is a view."""
        scales = None if self.scales is None else _select(self.scales, which)
        return dequantize(_select(self.stored, which), scales, self.dtype)


def _select(pool: Tensor, which: slice | Tensor) -> Tensor:
    return pool[which] if isinstance(which, slice) else pool.index_select(0, which)


def layer_pages(
    keys: Tensor, values: Tensor, scales: Tensor | None, dtype: torch.dtype
) -> tuple[Pages, Pages]:
    """A layer's keys and values [N, K, P, D], and their scales [2, N, K, P]."""
    of_keys, of_values = (None, None) if scales is None else scales.unbind()
    return Pages(keys, of_keys, dtype), Pages(values, of_values, dtype)
