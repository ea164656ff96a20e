"""A small network with random weights, and the plainest loop that lets it write."""

from __future__ import annotations

from typing import Any

import torch

from model.batch import BatchBuilder, BatchRow
from model.config import ModelConfig
from model.cuda_graphs import DecodeGraphs
from model.kv_cache import KVCache
from model.llama import Llama

SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 503,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4_096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


def random_llama(
    device: str,
    attention: str = "auto",
    dtype: torch.dtype = torch.float32,
    *,
    pack: bool = True,
    **changes: Any,
) -> Llama:
    """The same weights on every device: logits far enough apart that rounding decides nothing."""
    config = ModelConfig.from_huggingface(SHAPE | changes)
    model = Llama(config, dtype, device, attention=attention)
    generator = torch.Generator().manual_seed(0)
    for name, slot in model.slots().items():
        weight = torch.randn(slot.shape, generator=generator)
        slot.fill(weight * 0.1 + 1 if "norm" in name else weight * 0.15)
    if pack:
        model.pack()
    return model.eval()


class Writer:
    """Greedy text of several prompts at once: their chunks in one step, then decodes together."""

    def __init__(self, model: Llama, block_size: int, *, with_graphs: bool = False) -> None:
        self.model = model
        self.block_size = block_size
        self.cache = KVCache(model.config, 64, block_size, model.dtype, model.device)
        self._builder = BatchBuilder(2_048, 16, 16, block_size, model.device)
        self.graphs: DecodeGraphs | None = None
        if with_graphs:
            self.graphs = DecodeGraphs(model, self.cache, 16, 16)
            self.graphs.capture()

    @torch.inference_mode()
    def write(self, prompts: list[list[int]], steps: int) -> list[list[int]]:
        texts = [list(prompt) for prompt in prompts]
        tables = [list(range(1 + i * 4, 5 + i * 4)) for i in range(len(texts))]
        starts = [0] * len(texts)
        for _ in range(steps):
            rows = [
                BatchRow(text[start:], start, table, num_logits=1)
                for text, start, table in zip(texts, starts, tables, strict=True)
            ]
            starts = [len(text) for text in texts]
            for text, token in zip(texts, self.step(rows), strict=True):
                text.append(token)
        return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]

    def step(self, rows: list[BatchRow]) -> list[int]:
        batch = self._builder.build(rows)
        if self.graphs is not None:
            return self.graphs.forward(batch).argmax(-1).tolist()
        logits = self.model.forward(batch, self.cache)
        return logits.argmax(-1).tolist()
