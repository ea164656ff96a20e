"""What moves the weights: Muon for the matrices of the layers, AdamW for all else."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaForCausalLM

WARMUP_STEPS = 60
DECAY_FROM = 0.35


class Optimizer:
    """Steps float32 masters and copies them to the bfloat16 weights that compute."""

    def __init__(self, network: LlamaForCausalLM, rate: float):
        self.weights = list(network.parameters())
        self.masters = [weight.detach().float().clone() for weight in self.weights]
        names = [name for name, _ in network.named_parameters()]
        is_matrix = ["layers" in name and "norm" not in name for name in names]
        matrices = [m for m, matrix in zip(self.masters, is_matrix, strict=True) if matrix]
        others = [m for m, matrix in zip(self.masters, is_matrix, strict=True) if not matrix]
        self.rate = rate
        self.muon = torch.optim.Muon(
            matrices, lr=rate, weight_decay=0.05, momentum=0.95, adjust_lr_fn="match_rms_adamw"
        )
        self.adamw = torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)

    def step(self, scale: float) -> None:
        for master, weight in zip(self.masters, self.weights, strict=True):
            assert weight.grad is not None
            master.grad = weight.grad.float()
            weight.grad = None
        torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
        for optimizer in (self.muon, self.adamw):
            for group in optimizer.param_groups:
                group["lr"] = self.rate * scale
            optimizer.step()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for master, weight in zip(self.masters, self.weights, strict=True):
                weight.copy_(master)

    def state(self) -> dict[str, Any]:
        return {
            "masters": self.masters,
            "muon": self.muon.state_dict(),
            "adamw": self.adamw.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            for master, weight, saved in zip(
                self.masters, self.weights, state["masters"], strict=True
            ):
                master.copy_(saved)
                weight.copy_(saved)
        self.muon.load_state_dict(state["muon"])
        self.adamw.load_state_dict(state["adamw"])


def rate_scale(step: int, done: float) -> float:
    """A short warm-up, a plateau, then straight down to almost nothing."""
    warm = min(1.0, (step + 1) / WARMUP_STEPS)
    return warm * min(1.0, (1.0 - done) / (1.0 - DECAY_FROM) + 0.01)
