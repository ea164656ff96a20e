"""Tiny random Llamas on disk, written by the tests that serve them."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB = 199
MAX_POSITIONS = 512
NAN_TOKEN = 198  # its embedding is not a number


def write_tiny_llama(folder: Path, seed: int = 7, vocabulary: int = VOCAB) -> LlamaForCausalLM:
    """A float32 Llama with margins far above rounding; returns transformers' own network."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_POSITIONS,
        initializer_range=0.3,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        dtype="float32",
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight[NAN_TOKEN] = float("nan")
        model.lm_head.weight[NAN_TOKEN] = 0.0  # far below the largest logit: not drawn by itself
    model.save_pretrained(folder)
    return model
