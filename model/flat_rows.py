"""The filtered draw for rows too flat for a few candidates, without sorting them.

Sorting 128,256 logits takes 8 ms a row on a CPU, and a client may ask for rows that need it at
every step. Here a row's tokens are counted and weighed in buckets of falling probability; whatever
has to be found in the order of tokens lies in one bucket, and only that one is sorted: about 2 ms.
The token is that of ``draw_by_rank`` over the whole row, exactly: weights are whole numbers.
"""

# V vocabulary, N buckets

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model.drawing import UNIT, DrawSettings, whole_mass

_BUCKETS = 4096
_PER_NAT = 160  # the last bucket begins at e^-25.6 of the best: less than half a unit, weight 0


def draw_flat_rows(logits: Tensor, settings: Sequence[DrawSettings]) -> Tensor:
    """As ``draw_by_rank`` with every token a candidate: [n, V] -> [n, 3]."""
    rows = zip(logits, settings, strict=True)
    drawn = [(_draw(row, own), row.max().item(), 1.0) for row, own in rows]
    return torch.tensor(drawn, dtype=torch.float64)


def _draw(logits: Tensor, settings: DrawSettings) -> int:
    row = _RankedRow(logits, settings.inverse_temperature)
    num_likely = int((row.exponents >= settings.log_min_p).sum())
    left_mass = row.mass_of_first(max(1, min(num_likely, settings.top_k)))
    bound = settings.top_p * left_mass
    if settings.is_share_of_whole_row(logits.numel()):
        scale = torch.tensor([[settings.inverse_temperature]])
        bound = settings.top_p * (whole_mass(logits.unsqueeze(0), scale).item() * UNIT)
    kept_mass = min(left_mass, row.mass_reaching(bound))
    return row.token_past(settings.uniform * kept_mass)


class _RankedRow:
    """A row's tokens in order (larger logit first, smaller id among equals), found by bucket."""

    def __init__(self, logits: Tensor, inverse_temperature: float) -> None:
        scale = torch.tensor(inverse_temperature, dtype=torch.float64).float()
        self.exponents = (logits - logits.max()) * scale
        self._logits = logits
        self._weights = torch.round(torch.exp(self.exponents) * UNIT).double()
        self._bucket_of = (self.exponents * -_PER_NAT).clamp(max=_BUCKETS - 1).int()
        # Up to and with each bucket.
        self._counts = torch.bincount(self._bucket_of, minlength=_BUCKETS).cumsum(0)
        self._masses = torch.bincount(self._bucket_of, self._weights, _BUCKETS).cumsum(0)

    def mass_of_first(self, count: int) -> float:
        """Of the ``count`` first tokens, in units."""
        bucket = int(torch.searchsorted(self._counts, count))
        if bucket == _BUCKETS - 1:  # nothing in there has weight
            return self._masses[-1].item()
        inside = count - (int(self._counts[bucket - 1]) if bucket else 0)
        return self._ends(self._members(bucket), bucket)[inside - 1].item()

    def mass_reaching(self, bound: float) -> float:
        """The first running mass that is not below ``bound``; all of it where none is."""
        bucket = int(torch.searchsorted(self._masses, bound))
        if bucket == _BUCKETS:
            return self._masses[-1].item()
        ends = self._ends(self._members(bucket), bucket)
        return ends[torch.searchsorted(ends, bound)].item()

    def token_past(self, target: float) -> int:
        """The first token with which the running mass exceeds ``target`` (below all of it)."""
        bucket = int(torch.searchsorted(self._masses, target, right=True))
        members = self._members(bucket)
        return int(members[torch.searchsorted(self._ends(members, bucket), target, right=True)])

    def _members(self, bucket: int) -> Tensor:
        """Ids of the bucket's tokens, in order."""
        ids = (self._bucket_of == bucket).nonzero().squeeze(1)
        _, order = torch.sort(self._logits[ids], descending=True, stable=True)
        return ids[order]

    def _ends(self, members: Tensor, bucket: int) -> Tensor:
        """The running mass at each member, of the whole row."""
        before = self._masses[bucket - 1] if bucket else 0.0
        return self._weights[members].cumsum(0) + before
