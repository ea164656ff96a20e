"""Rotary frequencies and angles equal transformers' for every scaling."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from model.config import ModelConfig
from model.rope import Rope, rotate, spread
from model.rope_config import RopeConfig
from tests.model.networks import ROPES

SIZES = {"hidden_size": 256, "num_attention_heads": 4, "vocab_size": 32, "intermediate_size": 32}
LLAMA_3_1 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
CASES: dict[str, dict[str, Any]] = {
    **ROPES,
    "llama-3.1": LLAMA_3_1,
    "llama-3.2": {**LLAMA_3_1, "factor": 32.0},
    "qwen2.5": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}
    | {"original_max_position_embeddings": 32_768},
    "yarn-below-one": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 0.5}
    | {"original_max_position_embeddings": 64},
    "yarn-narrow": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}
    | {"original_max_position_embeddings": 8},
    "yarn-equal-borders": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}
    | {"beta_fast": 1e-9, "beta_slow": 1e-9, "original_max_position_embeddings": 8},
}


def transformers_config(parameters: dict[str, Any], positions: int = 128) -> LlamaConfig:
    return LlamaConfig(**SIZES, max_position_embeddings=positions, rope_parameters=dict(parameters))


def rope_of(config: LlamaConfig) -> Rope:
    read = ModelConfig.from_huggingface(config.to_dict())
    return Rope(read.rope, read.head_size, torch.device("cpu"))


@pytest.mark.parametrize("name", CASES)
def test_frequencies_equal_transformers(name: str) -> None:
    config = transformers_config(CASES[name])
    rope = rope_of(config)
    wanted, factor = ROPE_INIT_FUNCTIONS[CASES[name]["rope_type"]](config, torch.device("cpu"))
    torch.testing.assert_close(rope.frequencies, wanted, atol=0, rtol=1e-6)
    assert rope.config.attention_factor == pytest.approx(factor, rel=1e-9)


@pytest.mark.parametrize("name", [*CASES, "none"])
def test_angles_equal_transformers(name: str) -> None:
    parameters = CASES.get(name, {"rope_type": "default", "rope_theta": 10_000.0})
    config = transformers_config(parameters)
    positions = torch.arange(128)
    cosines, sines = rope_of(config).angles(positions)
    wanted = LlamaRotaryEmbedding(config)(torch.zeros(1), positions.unsqueeze(0))
    for mine, theirs in zip((cosines, sines), wanted, strict=True):
        torch.testing.assert_close(mine, theirs[0, :, :32], atol=2e-5, rtol=0)


@pytest.mark.parametrize("length", [1, 127, 128, 129, 200, 513])
def test_dynamic_angles_are_those_of_a_sequence_that_ends_there(length: int) -> None:
    config = transformers_config(ROPES["dynamic"])
    wanted, _ = ROPE_INIT_FUNCTIONS["dynamic"](config, torch.device("cpu"), seq_len=length)
    cosines, _ = rope_of(config).angles(torch.tensor([length - 1]))
    torch.testing.assert_close(cosines[0], ((length - 1) * wanted).cos(), atol=2e-5, rtol=0)


def test_a_position_is_turned_the_same_whatever_stands_beside_it() -> None:
    rope = rope_of(transformers_config(ROPES["dynamic"]))
    whole, _ = rope.angles(torch.arange(300))
    alone, _ = rope.angles(torch.tensor([200]))
    assert torch.equal(whole[200:201], alone)


def test_rotation_equals_transformers() -> None:
    q, positions = torch.randn(7, 3, 64), torch.randint(0, 1000, (7,))
    rope = Rope(RopeConfig(), 64, torch.device("cpu"))
    cosines, sines = rope.angles(positions)
    both = (torch.cat((each, each), -1).unsqueeze(0) for each in (cosines, sines))
    by_head = q.transpose(0, 1).unsqueeze(0)
    wanted, _ = apply_rotary_pos_emb(by_head, by_head, *both)
    mine = rotate(q, *spread(cosines, sines))
    torch.testing.assert_close(mine, wanted[0].transpose(0, 1))


def test_rotation_keeps_lengths() -> None:
    q = torch.randn(5, 2, 16)
    rope = Rope(RopeConfig(), 16, torch.device("cpu"))
    turned = rotate(q, *spread(*rope.angles(torch.arange(5) * 999)))
    torch.testing.assert_close(turned.norm(dim=-1), q.norm(dim=-1))
