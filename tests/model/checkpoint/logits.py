"""One prompt through a network of ours, and through one of transformers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from model.batch import BatchBuilder, BatchRow
from model.kv_cache import KVCache
from model.llama import Llama

BLOCK_SIZE = 32


def logits_of(model: Llama, tokens: Sequence[int]) -> Tensor:
    """Logits after every token, [len(tokens), vocabulary], of one prompt computed in one step."""
    num_blocks = -(-len(tokens) // BLOCK_SIZE)
    cache = KVCache(model.config, num_blocks + 1, BLOCK_SIZE, torch.float32, torch.device("cpu"))
    builder = BatchBuilder(len(tokens), 1, num_blocks, BLOCK_SIZE, torch.device("cpu"))
    table = list(range(1, num_blocks + 1))
    batch = builder.build([BatchRow(list(tokens), 0, table, len(tokens))])
    with torch.inference_mode():
        return model(batch, cache).clone()


def reference_logits(model: PreTrainedModel, tokens: Sequence[int]) -> Tensor:
    with torch.inference_mode():
        return model(torch.tensor([list(tokens)])).logits[0].float()


def difference(model: Llama, reference: PreTrainedModel, tokens: Sequence[int]) -> float:
    return float((logits_of(model, tokens) - reference_logits(reference, tokens)).abs().max())
