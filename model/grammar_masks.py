"""Masks of constrained rows: filled in a thread beside the forward, applied as bits."""

# n rows, V vocabulary, W words of 32 tokens

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy
import torch
from llguidance import LLExecutor
from numpy.typing import NDArray
from torch import Tensor

from model.grammar import GrammarState
from model.transfers import to_device

Words = NDArray[numpy.int32]
THREADS = 4  # at most, and no more than half of what the process has


class MaskFiller:
    """One step's masks at a time; the memory they lie in is the step's own."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="masks")
        self._executor = LLExecutor(max(1, min(THREADS, torch.get_num_threads() // 2)))

    def start(self, states: Sequence[GrammarState], num_words: int) -> Masks:
        """Begins; nobody may touch the states until ``wait``."""
        words = numpy.empty((len(states), num_words), dtype=numpy.int32)
        return Masks(words, self._thread.submit(self._fill, states, words))

    def _fill(self, states: Sequence[GrammarState], words: Words) -> None:
        size, row_bytes = len(states), words.shape[1] * 4
        places = []
        for row, state in enumerate(states):
            if state.num_taken:
                places.append((state.matcher, row))
            else:
                words[row] = numpy.frombuffer(state.first, dtype=numpy.int32)
        if len(places) == 1:
            matcher, row = places[0]
            matcher.unsafe_compute_mask_ptr(words[row].ctypes.data, row_bytes)
        elif places:
            self._executor.unsafe_compute_mask_ptr(places, words.ctypes.data, row_bytes, size)

    def close(self) -> None:
        self._thread.shutdown(wait=False)


class Masks:
    """[n, W] int32 on their way, a row for each state."""

    def __init__(self, words: Words, filled: Future[None]) -> None:
        self._words = words
        self._filled = filled

    def wait(self) -> Words:
        self._filled.result()
        return self._words


def set_bits(mask: Words, tokens: Sequence[int], value: bool) -> None:
    """Of one row, [W], in place."""
    row = mask.view(numpy.uint32)
    for token in tokens:
        bit = 1 << (token % 32)
        word = int(row[token // 32])
        row[token // 32] = word | bit if value else word & ~bit


def has_bit(mask: Words, tokens: Sequence[int]) -> bool:
    """Whether any of the tokens' bits is set in one row, [W]."""
    ids = numpy.asarray(tokens)
    return bool(((mask.view(numpy.uint32)[ids // 32] >> (ids % 32).astype(numpy.uint32)) & 1).any())


def apply_masks(logits: Tensor, rows: Sequence[int], masks: Sequence[Words]) -> None:
    """Minus infinity in ``logits[rows[i]]`` [V], in place, for tokens not in ``masks[i]`` [W]."""
    if logits.device.type == "cpu":
        for row, mask in zip(rows, masks, strict=True):
            _apply_here(logits[row], mask)
        return
    words = to_device(torch.from_numpy(numpy.stack(masks)), logits.device)
    apply_words(logits, rows, words)


def _apply_here(row: Tensor, mask: Words) -> None:
    """By numpy: PyTorch's threads cost a row of 128k more than the work does."""
    bits = numpy.unpackbits(mask.view(numpy.uint8), count=row.numel(), bitorder="little")
    numpy.putmask(row.numpy(), bits == 0, -numpy.inf)


def apply_words(logits: Tensor, rows: Sequence[int], words: Tensor) -> None:
    """As ``apply_masks``, for ``words`` [n, W] on the logits' device."""
    bits = torch.ones(32, dtype=torch.int32, device=logits.device)
    bits <<= torch.arange(32, dtype=torch.int32, device=logits.device)
    barred = (words.unsqueeze(-1) & bits).view(len(rows), -1)[:, : logits.size(1)] == 0
    where = to_device(torch.tensor(list(rows)), logits.device)
    logits[where] = logits[where].masked_fill_(barred, float("-inf"))
