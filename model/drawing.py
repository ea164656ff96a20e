"""The three ways a token is drawn from a row, as tensor operations that wait for nothing.

Each takes logits [n, V] and the rows' settings and returns [n, 3] float64: the token, the row's
largest logit (how a broken row is told), and 1 where the token is certain. Only ``draw_by_rank``
may be uncertain: with the settings of that row and more candidates it is asked again.
"""

# n rows, V vocabulary, K candidates

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.largest import BLOCK, argmax, block_sums, largest
from model.transfers import to_device

UNIT = 2.0**35  # weights of at most 1 in these units, summed over 2^17 tokens, fill 52 bits
_CACHED_ENTRIES = 1 << 18  # a slice of rows this large stays in a core's cache


@dataclass(frozen=True, slots=True)
class DrawSettings:
    """One row's numbers, on the host. Filters that are off have the value that keeps everything."""

    uniform: float
    inverse_temperature: float
    top_k: int  # the vocabulary's size is off
    top_p: float
    log_min_p: float  # minus infinity is off

    def is_share_of_whole_row(self, vocab_size: int) -> bool:
        """Top-p alone: its share is of the mass of the whole row, not of a prefix."""
        return self.top_p < 1.0 and self.top_k >= vocab_size and self.log_min_p == -float("inf")


def pick_largest(logits: Tensor) -> Tensor:
    """The largest logit; the smallest id among equals."""
    values, tokens = argmax(logits)
    return _result(tokens, values, torch.ones_like(tokens))


def draw_by_id(logits: Tensor, settings: Sequence[DrawSettings]) -> Tensor:
    """From the whole distribution: the cumulative one in order of token id, inverted."""
    columns = _columns(settings, logits.device)
    uniforms, scale = columns[:, :1], columns[:, 1:2].float()
    parts = []
    for rows in slices_of(logits):
        best = logits[rows].amax(-1, keepdim=True)
        weights = torch.softmax((logits[rows] - best).mul_(scale[rows]), dim=-1)
        tokens = _invert(weights, uniforms[rows])
        parts.append(_result(tokens, best.squeeze(1), torch.ones_like(tokens)))
    return _joined(parts)


def draw_by_rank(logits: Tensor, settings: Sequence[DrawSettings], num_candidates: int) -> Tensor:
    """From the kept prefix of the distribution in falling order, seen through K candidates."""
    vocab_size = logits.size(1)
    values, ids = largest(logits, min(num_candidates, vocab_size))
    columns = _columns(settings, logits.device)
    whole = [i for i, row in enumerate(settings) if row.is_share_of_whole_row(vocab_size)]
    masses = _masses(logits, columns, whole) if whole else None
    rank, certain = _draw_rank(values, columns, masses, is_complete=values.size(1) == vocab_size)
    best = values[:, 0]
    return _result(ids.gather(1, rank).squeeze(1), best, certain.squeeze(1) | ~best.isfinite())


def slices_of(logits: Tensor) -> Iterator[slice]:
    """Rows worked on together: all of them on a GPU, what stays in cache on a CPU."""
    num_rows, width = logits.shape
    step = num_rows if logits.is_cuda else max(1, _CACHED_ENTRIES // width)
    return (slice(start, start + step) for start in range(0, num_rows, max(1, step)))


def _draw_rank(
    values: Tensor, columns: Tensor, masses: Tensor | None, *, is_complete: bool
) -> tuple[Tensor, Tensor]:
    """[n, K] falling logits -> [n, 1] place drawn, [n, 1] whether the candidates sufficed."""
    uniforms, scale, top_k, top_p, log_min_p = columns.T.unsqueeze(-1)  # [n, 1] each
    num_candidates = values.size(1)
    exponents = (values - values[:, :1]) * scale.float()
    weights = torch.round(torch.exp(exponents) * UNIT).double()
    ends = weights.cumsum(-1)  # exact: whole numbers below 2^53

    num_likely = (exponents >= log_min_p.float()).sum(-1, keepdim=True)
    num_left = torch.minimum(num_likely, top_k.long()).clamp(min=1)
    left_mass = ends.gather(1, num_left - 1)
    seen = num_left < num_candidates
    if masses is not None:
        left_mass = torch.where(masses > 0, masses * UNIT, left_mass)
        seen |= masses > 0

    places = torch.arange(num_candidates, device=values.device)
    kept = (ends - weights < top_p * left_mass) & (places < num_left)
    last = kept.sum(-1, keepdim=True).clamp(min=1) - 1
    target = uniforms * ends.gather(1, last)
    rank = torch.searchsorted(ends, target, right=True).clamp(max=num_candidates - 1)
    if is_complete:
        return rank, torch.ones_like(seen)
    # Equals of the last candidate may lie outside: the prefix must end above them.
    return rank, seen & (values.gather(1, last) > values[:, -1:])


def _masses(logits: Tensor, columns: Tensor, whole: list[int]) -> Tensor:
    """[n, 1] float64: the sum of weights of the rows in ``whole``, the largest 1; 0 elsewhere."""
    scale = columns[:, 1:2].float()
    if len(whole) == logits.size(0):
        return _joined([whole_mass(logits[rows], scale[rows]) for rows in slices_of(logits)])
    index = to_device(torch.tensor(whole), logits.device)
    logits, scale = logits[index], scale[index]
    masses = _joined([whole_mass(logits[rows], scale[rows]) for rows in slices_of(logits)])
    return torch.zeros_like(columns[:, :1]).index_copy_(0, index, masses)


def whole_mass(logits: Tensor, scale: Tensor) -> Tensor:
    """[n, V] logits, [n, 1] inverse temperatures -> [n, 1] float64: in weights of the largest."""
    best = logits.amax(-1, keepdim=True)
    largest_share = torch.softmax((logits - best).mul_(scale), dim=-1).amax(-1, keepdim=True)
    return largest_share.double().reciprocal()


def _invert(weights: Tensor, uniforms: Tensor) -> Tensor:
    """[n, V] weights, [n, 1] uniforms -> [n] ids: first the block, then the place inside it."""
    ends = block_sums(weights).cumsum(-1)
    target = uniforms * ends[:, -1:]
    block = torch.searchsorted(ends, target, right=True).clamp(max=ends.size(1) - 1)
    start = torch.where(block > 0, ends.gather(1, (block - 1).clamp(min=0)), 0.0)

    ids = block * BLOCK + torch.arange(BLOCK, device=weights.device)
    inside = weights.gather(1, ids.clamp(max=weights.size(1) - 1)).double()
    inside = torch.where(ids < weights.size(1), inside, 0.0)
    place = torch.searchsorted(inside.cumsum(-1), target - start, right=True)
    # A block's float32 sum may be a little more than its parts: stay on a token with weight.
    last = torch.where(inside > 0, torch.arange(BLOCK, device=weights.device), 0).amax(
        -1, keepdim=True
    )
    return ids.gather(1, torch.minimum(place, last)).squeeze(1)


def _columns(settings: Sequence[DrawSettings], device: torch.device) -> Tensor:
    """[n, 5] float64, in the order of the fields."""
    rows = [(s.uniform, s.inverse_temperature, s.top_k, s.top_p, s.log_min_p) for s in settings]
    return to_device(torch.tensor(rows, dtype=torch.float64), device)


def _result(tokens: Tensor, best: Tensor, certain: Tensor) -> Tensor:
    return torch.stack([tokens.double(), best.double(), certain.double()], dim=1)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
