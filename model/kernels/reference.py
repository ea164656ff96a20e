"""The kernels in PyTorch: what linear.c and attention.c compute, said plainly. Any dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model.kernels import PagedRows
from model.quantization import QuantizedWeight

Weight = Tensor | QuantizedWeight


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (scaled * weight.float()).to(x.dtype)


def linear(
    x: Tensor,
    norm: Tensor | None,
    weight: Weight,
    bias: Tensor | None,
    eps: float,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    inputs = (x if norm is None else rms_norm(x, norm, eps)).float()
    if isinstance(weight, QuantizedWeight):
        inputs, weight = in_eight_bits(inputs, weight), weight.dequantize(torch.float32)
    return F.linear(inputs, weight.float(), None if bias is None else bias.float()).to(out_dtype)


def in_eight_bits(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """Each group of inputs rounded to 127 steps of either sign, as integer weights meet it."""
    order = torch.arange(x.size(1)) if weight.order is None else weight.order
    grouped = x[:, order].view(len(x), -1, weight.group)
    peak = grouped.abs().amax(-1, keepdim=True)
    steps = torch.where(peak > 0, torch.full_like(peak, 127.0) / peak, 0.0)
    rounded = (torch.round(grouped * steps) * (peak / 127)).flatten(1)
    return torch.empty_like(x).index_copy_(1, order, rounded)


def linear_add(x: Tensor, weight: Weight, bias: Tensor | None, residual: Tensor) -> None:
    residual.copy_(residual.float() + linear(x, None, weight, bias, 0.0, torch.float32))


def gate_up(
    x: Tensor,
    norm: Tensor,
    weight: Weight,
    bias: Tensor | None,
    eps: float,
    more: Tensor | None = None,
) -> Tensor:
    both = linear(x, norm, weight, bias, eps, torch.float32)
    gate, up = (both if more is None else both + more.float()).chunk(2, dim=-1)
    return (F.silu(gate) * up).to(x.dtype)


def paged_attention(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: PagedRows,
    *,
    scale: float,
    window: int | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """One token after another, float32 softmax; a bf16 cache."""
    _, kv_heads, page_size, head_size = keys.shape
    heads = qkv.shape[1] // head_size - 2 * kv_heads
    starts = rows.starts.tolist()
    outputs = []
    for row in range(len(starts) - 1):
        for token in range(starts[row], starts[row + 1]):
            q, k, v = torch.split(qkv[token].view(-1, head_size), [heads, kv_heads, kv_heads])
            if q_norm is not None and k_norm is not None:
                q, k = rms_norm(q, q_norm, eps), rms_norm(k, k_norm, eps)
            seen = int(rows.contexts[row]) - (starts[row + 1] - token) + 1
            pages = rows.tables[row, : -(-seen // page_size)].long()
            last = (pages[(seen - 1) // page_size], slice(None), (seen - 1) % page_size)
            keys[last] = rotate(k, rows.cosines[token], rows.sines[token])
            values[last] = v
            first = max(0, seen - window) if window else 0
            past_keys = _past(keys, pages)[:, first:seen]  # KV, seen, D
            past_values = _past(values, pages)[:, first:seen]
            turned = rotate(q, rows.cosines[token], rows.sines[token]).float()
            scores = turned.view(kv_heads, -1, head_size) @ past_keys.transpose(1, 2) * scale
            outputs.append((scores.softmax(-1) @ past_values).flatten().to(qkv.dtype))
    return torch.stack(outputs)


def _past(pool: Tensor, pages: Tensor) -> Tensor:
    return pool[pages].transpose(0, 1).flatten(1, 2).float()


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotary position of [heads, D] by [D / 2] angles: element i turns with element i + D / 2."""
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat((first * cosines - second * sines, second * cosines + first * sines), dim=-1)
    return turned.to(x.dtype)
