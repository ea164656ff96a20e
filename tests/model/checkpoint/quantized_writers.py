"""Quantized Hugging Face folders, written by each format's published definition, word by word.

Every writer takes a weight [N, K], gives what the files hold of it, and the numbers these stand
for, computed here by the definition's own formula. Sources: AWQ: AutoAWQ's WQLinear_GEMM
(awq/modules/linear/gemm.py); GPTQ: AutoGPTQ's QuantLinear (nn_modules/qlinear); compressed-tensors:
its compressors pack_quantized and naive_quantized; fp8: DeepSeek-V3's inference/kernel.py
(weight_dequant), FBGEMM's row-wise scales as transformers' FbgemmFp8Linear holds them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from tests.model.checkpoint.writers import write_huggingface

Stored: TypeAlias = tuple[dict[str, Tensor], Tensor]  # tensors by suffix, and the weight they mean
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def words(values: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """[X, Y] unsigned -> [X, Y * bits / 32] int32, lowest bits first."""
    each = 32 // bits
    order = order or tuple(range(each))
    packed = torch.zeros(values.shape[0], -(-values.shape[1] // each), dtype=torch.int64)
    for place, which in enumerate(order):
        column = values[:, which::each].long()
        packed[:, : column.shape[1]] |= column << (bits * place)
    return (packed - ((packed >> 31) << 32)).to(torch.int32)


def rounded(weight: Tensor, scales: Tensor, zeros: Tensor, index: Tensor, bits: int) -> Tensor:
    """Unsigned values [N, K]; ``index`` [K] names each input's group."""
    values = (weight / scales[:, index] + zeros[:, index]).round()
    return values.clamp(0, (1 << bits) - 1)


def ranges(weight: Tensor, index: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """scales and zeros [N, G]."""
    count = int(index.max()) + 1
    groups = [weight[:, index == group] for group in range(count)]
    if symmetric:
        largest = torch.stack([group.abs().amax(1) for group in groups], 1)
        scales = (largest / ((1 << (bits - 1)) - 1)).half().float()
        return scales, torch.full_like(scales, 1 << (bits - 1))
    low = torch.stack([group.amin(1) for group in groups], 1).clamp(max=0)
    high = torch.stack([group.amax(1) for group in groups], 1).clamp(min=0)
    scales = ((high - low) / ((1 << bits) - 1)).half().float()
    return scales, (-low / scales).round().clamp(1, (1 << bits) - 1)


def awq(weight: Tensor, group: int = 32) -> Stored:
    index = torch.arange(weight.shape[1]) // group
    scales, zeros = ranges(weight, index, 4, symmetric=False)
    values = rounded(weight, scales, zeros, index, 4)
    tensors = {
        "qweight": words(values.t(), 4, AWQ_ORDER),
        "qzeros": words(zeros.t(), 4, AWQ_ORDER),
        "scales": scales.t().half().contiguous(),
    }
    return tensors, (values - zeros[:, index]) * scales[:, index]


def gptq(
    weight: Tensor,
    bits: int = 4,
    group: int = 32,
    *,
    symmetric: bool = False,
    act_order: bool = False,
    less: int = 1,
) -> Stored:
    index = torch.arange(weight.shape[1]) // group
    if act_order:
        index = index[torch.randperm(len(index), generator=torch.Generator().manual_seed(5))]
    scales, zeros = ranges(weight, index, bits, symmetric)
    values = rounded(weight, scales, zeros, index, bits)
    tensors = {
        "qweight": words(values, bits).t().contiguous(),
        "qzeros": words((zeros - less).t(), bits),
        "scales": scales.t().half().contiguous(),
        "g_idx": index.to(torch.int32),
    }
    return tensors, (values - zeros[:, index]) * scales[:, index]


def packed(
    weight: Tensor, bits: int = 4, group: int | None = 32, *, symmetric: bool = True
) -> Stored:
    index = torch.arange(weight.shape[1]) // (group or weight.shape[1])
    scales, zeros = ranges(weight, index, bits, symmetric)
    values = rounded(weight, scales, zeros, index, bits)
    tensors = {
        "weight_packed": words(values, bits),
        "weight_scale": scales.half(),
        "weight_shape": torch.tensor(weight.shape),
    }
    if not symmetric:
        tensors["weight_zero_point"] = words(zeros.t(), bits).t().contiguous()
    return tensors, (values - zeros[:, index]) * scales[:, index]


def integers(weight: Tensor, *, symmetric: bool = True) -> Stored:
    index = torch.zeros(weight.shape[1], dtype=torch.int64)
    scales, zeros = ranges(weight, index, 8, symmetric)
    values = rounded(weight, scales, zeros, index, 8)
    tensors = {"weight": (values - 128).to(torch.int8), "weight_scale": scales}
    if not symmetric:
        tensors["weight_zero_point"] = (zeros - 128).to(torch.int8)
    return tensors, (values - zeros[:, index]) * scales[:, index]


def fp8(weight: Tensor, kind: str = "channel", name: str = "weight_scale") -> Stored:
    if kind == "channel":
        scales = weight.abs().amax(1, keepdim=True) / 448
        spread = scales
    elif kind == "tensor":
        scales = (weight.abs().amax() / 448).reshape(1)
        spread = scales
    else:  # blocks of 32 x 48, those at the edges cut
        tall, wide = 32, 48
        rows, columns = -(-weight.shape[0] // tall), -(-weight.shape[1] // wide)
        scales = torch.stack(
            [
                torch.stack(
                    [_block(weight, r * tall, c * wide, tall, wide) for c in range(columns)]
                )
                for r in range(rows)
            ]
        )
        spread = scales.repeat_interleave(tall, 0)[: weight.shape[0]]
        spread = spread.repeat_interleave(wide, 1)[:, : weight.shape[1]]
    values = (weight / spread).to(torch.float8_e4m3fn)
    return {"weight": values, name: scales}, values.float() * spread


def _block(weight: Tensor, row: int, column: int, tall: int, wide: int) -> Tensor:
    return weight[row : row + tall, column : column + wide].abs().amax() / 448


def compressed(form: str, weights: dict[str, Any], **more: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
        **more,
    }


def write_quantized(
    model: PreTrainedModel,
    folder: Path,
    config: dict[str, Any],
    store: Callable[[Tensor], Stored],
) -> PreTrainedModel:
    """Writes the decoder's linear layers by ``store``; ``model`` gets what the files now mean."""
    write_huggingface(model, folder)
    tensors = load_file(folder / "model.safetensors")
    for name, parameter in model.named_parameters():
        if not name.endswith("_proj.weight"):
            continue
        layer = name.removesuffix(".weight")
        stored, meant = store(tensors.pop(name).float())
        tensors |= {f"{layer}.{part}": tensor.contiguous() for part, tensor in stored.items()}
        parameter.data.copy_(meant)
    save_file(tensors, folder / "model.safetensors")
    document = json.loads((folder / "config.json").read_text())
    document["quantization_config"] = config
    (folder / "config.json").write_text(json.dumps(document))
    return model
