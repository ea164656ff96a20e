"""PEFT folders with random adapters, and the same adapters merged into transformers' weights."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PREFIX = "base_model.model."


def modules_of(network: PreTrainedModel, targets: Iterable[str]) -> list[str]:
    return [
        name
        for name, module in network.named_modules()
        if isinstance(module, torch.nn.Linear) and name.rsplit(".", 1)[-1] in set(targets)
    ]


def random_adapter(
    network: PreTrainedModel,
    targets: Iterable[str] = ALL,
    rank: int = 4,
    seed: int = 0,
    ranks: dict[str, int] | None = None,
) -> dict[str, tuple[Tensor, Tensor]]:
    """module: (A [r, K], B [N, r]), large enough to change what the network says."""
    generator = torch.Generator().manual_seed(seed)
    modules = dict(network.named_modules())
    found = {}
    for name in modules_of(network, targets):
        outputs, inputs = modules[name].weight.shape
        own = (ranks or {}).get(name, rank)
        down = torch.randn(own, inputs, generator=generator) * 0.2
        found[name] = (down, torch.randn(outputs, own, generator=generator) * 0.2)
    return found


def tensors_of(adapter: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Named as PEFT names them."""
    stored = {}
    for module, (down, up) in adapter.items():
        stored[f"{PREFIX}{module}.lora_A.weight"] = down.contiguous()
        stored[f"{PREFIX}{module}.lora_B.weight"] = up.contiguous()
    return stored


def write_folder(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    standard = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": list(ALL),
        "bias": "none",
        "modules_to_save": None,
        "use_dora": False,
        "qalora_group_size": 16,
        "megatron_core": "megatron.core",
        "runtime_config": {"ephemeral_gpu_offload": False},
    }
    (folder / "adapter_config.json").write_text(json.dumps(standard | config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def merged(
    network: PreTrainedModel,
    adapter: dict[str, tuple[Tensor, Tensor]],
    scale: float | dict[str, float],
) -> PreTrainedModel:
    """W + scale B A, computed in float64: what the adapter means."""
    network = copy.deepcopy(network)
    modules = dict(network.named_modules())
    with torch.no_grad():
        for name, (down, up) in adapter.items():
            own = scale if isinstance(scale, float) else scale[name]
            delta = own * (up.double() @ down.double())
            modules[name].weight.copy_((modules[name].weight.double() + delta).float())
    return network
