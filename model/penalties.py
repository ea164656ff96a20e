"""Everything a request may do to its logits before a token is drawn, as sparse index operations.

Order and meaning are vLLM's: bias, then repetition (prompt and output), frequency and presence
(output alone), then what is not allowed or banned goes to minus infinity, whatever its bias.
"""

# n rows, V vocabulary, E touched entries over all rows

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from model.grammar_masks import Words, apply_masks
from model.transfers import to_device

MOST_REPETITION = 1e6  # any finite penalty is valid; a stronger one would leave float32


class Adjustable(Protocol):
    """What of a sampling row this file reads. See ``model.sampler.SamplingRow``."""

    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: dict[int, float]
    allowed: Sequence[int] | Tensor | None
    banned: Sequence[int]
    prompt: Sequence[int]
    output: Sequence[int]
    penalties: PenaltyState | None
    mask: Words | None


class PenaltyState:
    """Which tokens a sequence has seen, kept from step to step so that no step counts them again.

    The caller keeps one for each sequence that has a penalty and calls ``catch_up`` before each
    draw, which costs what is new, not what is there. Without a repetition penalty
    ``count_prompt=False`` leaves the prompt's tokens out: no other penalty needs them.
    """

    def __init__(self, prompt: Sequence[int], *, count_prompt: bool = True) -> None:
        seen = list(dict.fromkeys(prompt)) if count_prompt else []
        self._slots = {token: slot for slot, token in enumerate(seen)}
        self._hold(torch.tensor(seen, dtype=torch.int64), torch.zeros(len(seen)))
        self._num_tokens = len(prompt)

    def catch_up(self, tokens: Sequence[int]) -> None:
        """``tokens`` is prompt and output so far; only those not yet counted are read."""
        assert len(tokens) >= self._num_tokens, "a sequence has lost tokens it was penalised for"
        self._count(tokens[self._num_tokens :])
        self._num_tokens = len(tokens)

    def ahead(self, tokens: Sequence[int]) -> PenaltyState:
        """What it would be after ``tokens``, which may never be said: a state of its own."""
        state = PenaltyState([], count_prompt=False)
        state._slots = self._slots.copy()
        state._hold(self._ids.clone(), self._counts.clone())
        state._num_tokens = self._num_tokens
        state._count(tokens)
        state._num_tokens += len(tokens)
        return state

    @property
    def ids(self) -> Tensor:
        """[E] int64 on the CPU: every token seen, once."""
        return self._ids[: len(self._slots)]

    @property
    def counts(self) -> Tensor:
        """[E] float32: how often each was put out; 0 for one that only the prompt has."""
        return self._counts[: len(self._slots)]

    @property
    def addresses(self) -> tuple[int, int, int]:
        """Of ``ids`` and ``counts``, good until the next ``catch_up``, and how many there are."""
        return self._ids.data_ptr(), self._counts.data_ptr(), len(self._slots)

    def _count(self, output: Iterable[int]) -> None:
        for token in output:
            slot = self._slots.setdefault(token, len(self._slots))
            if slot == self._ids.numel():
                room = max(16, slot)
                ids = torch.cat([self._ids, torch.zeros(room, dtype=torch.int64)])
                self._hold(ids, torch.cat([self._counts, torch.zeros(room)]))
            self._id_of[slot] = token
            self._count_of[slot] += 1

    def _hold(self, ids: Tensor, counts: Tensor) -> None:
        """The arrays are the tensors' own memory: an entry is written ten times as fast."""
        self._ids, self._counts = ids, counts
        self._id_of, self._count_of = ids.numpy(), counts.numpy()


def has_penalty(row: Adjustable) -> bool:
    return (
        row.repetition_penalty != 1.0 or row.frequency_penalty != 0.0 or row.presence_penalty != 0.0
    )


def is_adjusted(row: Adjustable) -> bool:
    is_limited = row.allowed is not None or len(row.banned) or row.mask is not None
    return bool(row.logit_bias or is_limited or has_penalty(row))


def adjust(logits: Tensor, rows: Sequence[Adjustable]) -> None:
    """Changes ``logits`` [n, V] (contiguous) in place; ``rows[i]`` says how row i is changed."""
    assert logits.is_contiguous(), "a view of the caller's logits would be changed with them"
    _add_bias(logits, rows)
    _penalise(logits, rows)
    _restrict(logits, rows)
    _ban(logits, rows)
    masked = [(i, row.mask) for i, row in enumerate(rows) if row.mask is not None]
    if masked:
        apply_masks(logits, [i for i, _ in masked], [mask for _, mask in masked])


def _add_bias(logits: Tensor, rows: Sequence[Adjustable]) -> None:
    biased = [(i, row.logit_bias) for i, row in enumerate(rows) if row.logit_bias]
    if not biased:
        return
    places = _places(logits, [(i, torch.tensor(list(bias))) for i, bias in biased])
    values = torch.tensor([value for _, bias in biased for value in bias.values()])
    flat = logits.view(-1)
    flat[places] += to_device(values, logits.device)


def _penalise(logits: Tensor, rows: Sequence[Adjustable]) -> None:
    states = [(i, state_of(row)) for i, row in enumerate(rows) if has_penalty(row)]
    if not states:
        return
    places = _places(logits, [(i, state.ids) for i, state in states])
    of_rows = torch.tensor([strengths(rows[i]) for i, _ in states])  # [rows, 3]
    lengths = torch.tensor([state.ids.numel() for _, state in states])
    columns = of_rows.repeat_interleave(lengths, dim=0)
    counts = torch.cat([state.counts for _, state in states])
    # One tensor, so that one copy brings it to the device.
    table = to_device(torch.cat([columns, counts.unsqueeze(1)], dim=1), logits.device)
    repetition, frequency, presence, counts = table.unbind(1)
    flat = logits.view(-1)
    values = flat[places]
    values = torch.where(values > 0, values / repetition, values * repetition)
    flat[places] = values - frequency * counts - presence * (counts > 0)


def strengths(row: Adjustable) -> tuple[float, float, float]:
    repetition = min(max(row.repetition_penalty, 1 / MOST_REPETITION), MOST_REPETITION)
    return repetition, row.frequency_penalty, row.presence_penalty


def state_of(row: Adjustable) -> PenaltyState:
    if row.penalties is not None:
        return row.penalties
    state = PenaltyState(row.prompt, count_prompt=row.repetition_penalty != 1.0)
    state.catch_up([*row.prompt, *row.output])
    return state


def _restrict(logits: Tensor, rows: Sequence[Adjustable]) -> None:
    restricted = [
        (i, torch.as_tensor(r.allowed)) for i, r in enumerate(rows) if r.allowed is not None
    ]
    if not restricted:
        return
    places = _places(logits, restricted)
    kept = logits.view(-1)[places]
    which = to_device(torch.tensor([i for i, _ in restricted]), logits.device)
    logits.index_fill_(0, which, float("-inf"))
    logits.view(-1)[places] = kept


def _ban(logits: Tensor, rows: Sequence[Adjustable]) -> None:
    banned = [(i, torch.as_tensor(r.banned)) for i, r in enumerate(rows) if len(r.banned)]
    if banned:
        logits.view(-1)[_places(logits, banned)] = float("-inf")


def _places(logits: Tensor, entries: Sequence[tuple[int, Tensor]]) -> Tensor:
    """(row, ids) pairs -> [E] int64, places in the flattened logits, on their device."""
    width = logits.size(1)
    flat = torch.cat([ids.to("cpu", torch.int64) + row * width for row, ids in entries])
    return to_device(flat, logits.device)
