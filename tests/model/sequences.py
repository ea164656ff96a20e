"""A network of transformers as one of ours, and what it says to sequences fed in any manner."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from model.batch import BatchBuilder, BatchRow
from model.config import ModelConfig
from model.kv_cache import KVCache
from model.llama import Llama, Taps


def ours(
    reference: PreTrainedModel, attention: str = "cpu", dtype: torch.dtype = torch.float32
) -> Llama:
    """The same weights in a ``Llama``, handed over in memory."""
    config = ModelConfig.from_huggingface(reference.config.to_dict())
    model = Llama(config, dtype, "cpu", attention=attention)
    stored = reference.state_dict()
    for name, slot in model.slots().items():
        slot.fill(stored[name])
    model.pack()
    return model.eval()


@torch.inference_mode()
def reference_logits(reference: PreTrainedModel, tokens: Sequence[int]) -> Tensor:
    """[len(tokens), V] float32 of one forward."""
    return reference(torch.tensor([list(tokens)])).logits[0].float()


@torch.inference_mode()
def reference_greedy(reference: PreTrainedModel, prompt: list[int], count: int) -> list[int]:
    """The prompt in one forward, then token by token over transformers' own cache."""
    output = reference(torch.tensor([prompt]), use_cache=True)
    text: list[int] = []
    while True:
        text.append(int(output.logits[0, -1].argmax()))
        if len(text) == count:
            return text
        past = output.past_key_values
        output = reference(torch.tensor([text[-1:]]), past_key_values=past, use_cache=True)


class Fed:
    """Sequences of one model whose pages lie in disorder, fed in rows of any length."""

    def __init__(self, model: Llama, block_size: int = 16, num_blocks: int = 120, seed: int = 0):
        self.model, self.block_size = model, block_size
        self.cache = KVCache(model.config, num_blocks, block_size, model.cache_dtype, model.device)
        self.builder = BatchBuilder(2_048, 40, num_blocks, block_size, model.device)
        self.free = list(range(1, num_blocks))
        random.Random(seed).shuffle(self.free)

    def table(self, length: int, shared: list[int] | None = None) -> list[int]:
        """Pages for so many tokens, the first of them shared ones."""
        shared = shared or []
        return shared + [
            self.free.pop() for _ in range(-(-length // self.block_size) - len(shared))
        ]

    @torch.inference_mode()
    def step(self, rows: list[BatchRow], taps: Taps | None = None) -> Tensor:
        return self.model(self.builder.build(rows), self.cache, taps).clone()

    def logits(self, tokens: list[int], chunks: Sequence[int] = ()) -> Tensor:
        """After every token, [len(tokens), V], fed in chunks of those sizes and then the rest."""
        table, start, found = self.table(len(tokens)), 0, []
        for size in (*chunks, len(tokens)):
            chunk = tokens[start : start + size]
            if chunk:
                found.append(self.step([BatchRow(chunk, start, table, len(chunk))]))
            start += len(chunk)
        return torch.cat(found)

    def greedy(self, prompts: list[list[int]], count: int, chunk: int = 1_000) -> list[list[int]]:
        """Continuations of all prompts at once: chunks beside decodes until all are done."""
        texts = [list(prompt) for prompt in prompts]
        tables = [self.table(len(prompt) + count) for prompt in prompts]
        computed = [0] * len(prompts)
        ends = [len(prompt) + count for prompt in prompts]
        while any(len(text) < end for text, end in zip(texts, ends, strict=True)):
            due = [i for i in range(len(texts)) if len(texts[i]) < ends[i]]
            counts = {i: min(chunk, len(texts[i]) - computed[i]) for i in due}
            due.sort(key=lambda i: counts[i] > 1)
            rows = [
                BatchRow(texts[i][computed[i] : computed[i] + counts[i]], computed[i], tables[i], 1)
                for i in due
            ]
            for i, token in zip(due, self.step(rows).argmax(-1).tolist(), strict=True):
                computed[i] += counts[i]
                if computed[i] == len(texts[i]):
                    texts[i].append(token)
        return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]


def random_tokens(count: int, seed: int = 0, vocabulary: int = 96) -> list[int]:
    return random.Random(seed).choices(range(vocabulary), k=count)
