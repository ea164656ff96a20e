"""Raw log-probabilities: of the model's own logits, before bias, penalties and temperature."""

# n rows, V vocabulary, K alternatives found for every row (a constant, so that no row's answer
# depends on what its neighbours asked for)

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.drawing import slices_of
from model.largest import largest
from model.transfers import HostCopy

_FOUND = 32  # more than 20, so that a tie at the last asked place is seen; who wants more pays more


@dataclass(frozen=True, slots=True)
class RawLogprob:
    """``rank`` 1 is the most likely; equals share the better rank. Alternatives are most likely
    first, the smaller id first among equals."""

    logprob: float
    rank: int
    top_ids: list[int]
    top_logprobs: list[float]


@dataclass(slots=True)
class PendingLogprobs:
    """Scores on their way: nothing has been waited for."""

    logits: Tensor  # [n, V]
    scores: HostCopy  # [n, 2 + 2K] float64: logprob, rank, alternatives' ids, their logprobs

    def on_host(self, num_alternatives: Sequence[int]) -> list[RawLogprob]:
        """``num_alternatives[i]`` is how many row i asked for. Waits for the device."""
        rows = self.scores.wait().tolist()
        pairs = zip(rows, num_alternatives, strict=True)
        return [self._read(i, row, wanted) for i, (row, wanted) in enumerate(pairs)]

    def _read(self, index: int, row: list[float], wanted: int) -> RawLogprob:
        found = (len(row) - 2) // 2
        ids, logprobs = row[2 : 2 + found], row[2 + found :]
        wanted = min(wanted, self.logits.size(1))
        if wanted > found or (
            0 < wanted < self.logits.size(1) and logprobs[wanted - 1] == logprobs[-1]
        ):
            ids, logprobs = self._settle_tie(index, wanted)
        return RawLogprob(row[0], int(row[1]), [int(i) for i in ids[:wanted]], logprobs[:wanted])

    def _settle_tie(self, index: int, wanted: int) -> tuple[list[float], list[float]]:
        """Equals beyond those found, or more than found: that takes the whole row in order."""
        logprobs = torch.log_softmax(self.logits[index], dim=-1)
        _, ids = torch.sort(self.logits[index], descending=True, stable=True)
        return ids[:wanted].tolist(), logprobs[ids[:wanted]].tolist()


def launch_logprobs(logits: Tensor, tokens: Tensor, *, alternatives: bool) -> PendingLogprobs:
    """Of ``tokens`` [n] int64 under ``logits`` [n, V] float32. Reads both, waits for nothing."""
    slices = [
        _score(logits[rows], tokens[rows].unsqueeze(1), alternatives=alternatives)
        for rows in slices_of(logits)
    ]
    return PendingLogprobs(logits, HostCopy(torch.cat(slices)))


def prompt_logprobs(
    logits: Tensor, targets: Sequence[int], num_alternatives: int
) -> list[RawLogprob]:
    """Of ``targets[i]`` under ``logits[i]``: the prompt's tokens, each under its predecessors."""
    assert logits.size(0) == len(targets)
    if not targets:
        return []
    tokens = torch.tensor(targets, device=logits.device)
    pending = launch_logprobs(logits, tokens, alternatives=num_alternatives > 0)
    return pending.on_host([num_alternatives] * len(targets))


def _score(logits: Tensor, tokens: Tensor, *, alternatives: bool) -> Tensor:
    logprobs = torch.log_softmax(logits, dim=-1)
    # Ones in float32: four times as fast to make and sum as booleans, exact below 2^24.
    larger = torch.gt(logits, logits.gather(1, tokens), out=torch.empty_like(logits))
    rank = larger.sum(-1, keepdim=True) + 1
    columns = [logprobs.gather(1, tokens).double(), rank.double()]
    if alternatives:
        _, ids = largest(logits, min(_FOUND, logits.size(1)))
        columns += [ids.double(), logprobs.gather(1, ids).double()]
    return torch.cat(columns, dim=1)
