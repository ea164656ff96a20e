"""The decode kernels in PyTorch: what decode.c computes, said plainly. Same shapes, any dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model.kernels import PagedRows


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (scaled * weight.float()).to(x.dtype)


def rms_linear(
    x: Tensor,
    norm: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    inputs = x if norm is None else rms_norm(x, norm, eps)
    return F.linear(inputs.float(), weight.float(), None if bias is None else bias.float()).to(
        out_dtype
    )


def linear_add(a: Tensor, weight: Tensor, bias: Tensor | None, x: Tensor) -> None:
    x.copy_(x.float() + rms_linear(a, None, weight, bias, 0.0, torch.float32))


def rms_gate_up(x: Tensor, norm: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    gate, up = rms_linear(x, norm, weight, bias, eps, torch.float32).chunk(2, dim=-1)
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
    """One row after another, float32 softmax."""
    _, kv_heads, page_size, head_size = keys.shape
    heads = qkv.shape[1] // head_size - 2 * kv_heads
    outputs = []
    for row, line in enumerate(qkv):
        q, k, v = line.view(-1, head_size).split([heads, kv_heads, kv_heads])
        if q_norm is not None and k_norm is not None:
            q, k = rms_norm(q, q_norm, eps), rms_norm(k, k_norm, eps)
        seen = int(rows.contexts[row])
        pages = rows.tables[row, : -(-seen // page_size)].long()
        last = (pages[(seen - 1) // page_size], slice(None), (seen - 1) % page_size)
        keys[last] = rotate(k, rows.cosines[row], rows.sines[row])
        values[last] = v
        first = max(0, seen - window) if window else 0
        past_keys = keys[pages].transpose(0, 1).flatten(1, 2)[:, first:seen].float()  # KV, S, D
        past_values = values[pages].transpose(0, 1).flatten(1, 2)[:, first:seen].float()
        turned = rotate(q, rows.cosines[row], rows.sines[row]).float().view(kv_heads, -1, head_size)
        weights = (turned @ past_keys.transpose(1, 2) * scale).softmax(-1)
        outputs.append((weights @ past_values).flatten().to(qkv.dtype))
    return torch.stack(outputs)


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotary position of [heads, D] by [D / 2] angles: element i turns with element i + D / 2."""
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat((first * cosines - second * sines, second * cosines + first * sines), dim=-1)
    return turned.to(x.dtype)
