"""How well a network predicts a text: the measure of what quantization costs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from model.batch import BatchBuilder, BatchRow
from model.kv_cache import KVCache
from model.llama import Llama

CONTEXT = 512  # tokens a window, half of them scored: each is seen from 256 before it on
BLOCK_SIZE = 256


@dataclass(frozen=True)
class Score:
    """``loss`` is the sum of the negative log-probabilities, in nats, of ``num_tokens`` tokens."""

    loss: float
    num_tokens: int
    seconds: float

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss / self.num_tokens)


@torch.inference_mode()
def score(
    model: Llama,
    texts: Sequence[Sequence[int]],
    begin: Sequence[int] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Score:
    """Scores every token of every text once; ``progress`` hears (tokens done, tokens in all).

    A window begins with ``begin``, what the tokenizer puts before a text, and then with the half of
    a window before what is scored. Raises ValueError for ids outside the vocabulary, or no token.
    """
    total = sum(max(0, len(text) - (not begin)) for text in texts)
    if not total:
        raise ValueError("there is no token to score")
    if max(max(text, default=0) for text in texts) >= model.config.vocab_size:
        raise ValueError("the text has tokens that are not in the model's vocabulary")
    windows = _Windows(model, len(begin))
    start, loss, done = time.monotonic(), 0.0, 0
    for text in texts:
        for first in range(0, len(text), windows.stride):
            scored = list(text[first : first + windows.stride])
            before = list(text[max(0, first - windows.stride) : first])
            lead = [*begin, *before]
            if not lead:  # nothing precedes the first token: it cannot be scored
                lead, scored = scored[:1], scored[1:]
            if scored:
                loss += windows.loss(lead, scored)
                done += len(scored)
            if progress is not None:
                progress(done, total)
    return Score(loss, done, time.monotonic() - start)


class _Windows:
    """A cache and a batch for one window at a time."""

    def __init__(self, model: Llama, num_begin: int) -> None:
        self.model = model
        self.stride = max(1, min(CONTEXT, model.config.max_positions - num_begin) // 2)
        longest = 2 * self.stride + num_begin
        pages = -(-longest // BLOCK_SIZE)
        self.table = list(range(1, pages + 1))
        self.cache = KVCache(model.config, pages + 1, BLOCK_SIZE, model.cache_dtype, model.device)
        self.builder = BatchBuilder(longest, 1, pages, BLOCK_SIZE, model.device)

    def loss(self, lead: list[int], scored: list[int]) -> float:
        """Of ``scored``, each token predicted from all before it."""
        tokens = lead + scored[:-1]
        batch = self.builder.build([BatchRow(tokens, 0, self.table, len(scored))])
        logits = self.model.forward(batch, self.cache)
        targets = torch.tensor(scored, device=logits.device)
        return float(F.cross_entropy(logits, targets, reduction="none").double().sum())
