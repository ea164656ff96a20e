"""Draws one token a row from a batch of logits.

A draw is a function of (seed, choice, position) and of the row's own distribution: never of the
neighbours, their settings, their number, or of which path below was fast enough. Three kinds of
row, told apart by the row's own settings:

- greedy (temperature below 1e-5): the largest logit, the smallest id among equals;
- unfiltered: one uniform through the inverse of the cumulative distribution in order of token id;
- filtered (top-k, top-p, min-p): the same in order of falling probability, the smaller id first
  among equals, over the kept prefix of that order. As in vLLM min-p is taken first, relative to
  the largest probability, then exactly k, then top-p of what those left.

On processors with compiled kernels all of it is one call (``model.kernels.sampling``), else tensor
operations, here. These draw a filtered row from its few hundred largest logits; where these do not
show the end of the kept prefix, ``collect`` draws that row again from all of them. Either way gives
the same token, because weights are whole multiples of 2^-35 whose float64 sums are exact in any
order. Between the compiled way and the other lies the rounding of ``exp``, no more.
"""

# R rows drawn, n rows of one kind, V vocabulary, K candidates

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from model.drawing import DrawSettings, draw_by_id, draw_by_rank, pick_largest
from model.flat_rows import draw_flat_rows
from model.kernels.sampling import RowsKernel, rows_kernel
from model.logprobs import PendingLogprobs, RawLogprob, launch_logprobs, prompt_logprobs
from model.penalties import adjust, is_adjusted
from model.sampling_row import Draw, Kind, SamplingRow
from model.transfers import HostCopy, to_device

_FEW, _MANY = 64, 256  # candidates: where every row has a small top-k, and else


class Drawn(Protocol):
    """Draws on their way: nothing has been waited for until ``collect``."""

    @property
    def tokens(self) -> Tensor:
        """[R] int64, still on the device, at ``places``; a valid id also where the draw failed."""

    @property
    def places(self) -> Sequence[int]:
        """Where in ``tokens`` each row's is."""

    def collect(self) -> list[Draw]:
        """One ``Draw`` a row, in the rows' order. The one place that waits for the device."""


class Sampler:
    """Stateless but for the size of its vocabulary."""

    def __init__(
        self, vocab_size: int, device: torch.device | str = "cpu", *, compiled: bool = True
    ) -> None:
        """``compiled=False`` draws by tensor operations where kernels are there, too."""
        self.vocab_size = vocab_size
        self.device = torch.device(device)
        self._kernel: RowsKernel | None = None
        if compiled and self.device.type == "cpu":
            self._kernel = rows_kernel(vocab_size, torch.get_num_threads())

    def launch(self, logits: Tensor, rows: Sequence[SamplingRow]) -> Drawn:
        """Queues the draws of ``rows`` from ``logits`` [*, V] float32, which it never changes.

        Waits for nothing. The logits must stay as they are until ``collect`` has returned.
        """
        assert logits.dtype == torch.float32, "sampling is done in float32"
        assert logits.size(1) == self.vocab_size, "logits of another vocabulary"
        if self._kernel is not None and logits.is_contiguous():
            return self._kernel.draw(logits, rows)
        groups = [
            _Group.launch(kind, logits, rows, members, self.vocab_size)
            for kind, members in self._members_by_kind(rows).items()
        ]
        return DrawnGroups(logits, rows, groups)

    def prompt_logprobs(
        self, logits: Tensor, targets: Sequence[int], num_alternatives: int
    ) -> list[RawLogprob]:
        """Of ``targets[i]`` under ``logits[i]``: the prompt's tokens. Waits for the device."""
        if self._kernel is not None and logits.is_contiguous():
            return self._kernel.score(logits, targets, num_alternatives)
        return prompt_logprobs(logits, targets, num_alternatives)

    def _members_by_kind(self, rows: Sequence[SamplingRow]) -> dict[Kind, list[int]]:
        members: dict[Kind, list[int]] = {}
        for index, row in enumerate(rows):
            members.setdefault(row.kind(self.vocab_size), []).append(index)
        return members


@dataclass(slots=True)
class _Group:
    """The rows of one kind, drawn by one call."""

    members: list[int]
    logits: Tensor  # [n, V], adjusted
    settings: list[DrawSettings]
    drawn: Tensor  # [n, 3] float64, see model.drawing

    @classmethod
    def launch(
        cls,
        kind: Kind,
        logits: Tensor,
        rows: Sequence[SamplingRow],
        members: list[int],
        vocab_size: int,
    ) -> _Group:
        chosen = [rows[i] for i in members]
        is_changed = any(is_adjusted(row) for row in chosen)
        own = _take(logits, [row.logits_row for row in chosen], is_changed=is_changed)
        if is_changed:
            adjust(own, chosen)
        settings = [row.draw_settings(vocab_size) for row in chosen]
        return cls(members, own, settings, _draw(kind, own, settings))

    def redraw(self, places: list[int]) -> Tensor:
        """[m, 3]: the filtered rows at ``places`` of this group, from all their tokens."""
        settings = [self.settings[place] for place in places]
        logits = self.logits[places]
        if logits.is_cuda:  # sorts fast, and waits at every value read
            return draw_by_rank(logits, settings, logits.size(1))
        return draw_flat_rows(logits, settings)


class DrawnGroups:
    """``Drawn`` by tensor operations."""

    def __init__(self, logits: Tensor, rows: Sequence[SamplingRow], groups: list[_Group]) -> None:
        self._logits = logits
        self._rows = rows
        self._groups = groups
        self._order = [index for group in groups for index in group.members]
        self._on_device: Tensor | None = None  # [R, 3]
        self._drawn: HostCopy | None = None
        self._scored: list[int] = []
        self._scores: PendingLogprobs | None = None
        if groups:
            drawn = torch.cat([group.drawn for group in groups])
            self._on_device = drawn
            self._drawn = HostCopy(drawn)
            self._launch_logprobs(drawn[:, 0].long())

    @property
    def tokens(self) -> Tensor:
        assert self._on_device is not None, "nothing is drawn"
        return self._on_device[:, 0].long().clamp_(0, self._logits.size(1) - 1)

    @property
    def places(self) -> list[int]:
        return sorted(range(len(self._order)), key=self._order.__getitem__)

    def collect(self) -> list[Draw]:
        if self._drawn is None:
            return []
        outcomes = dict(zip(self._order, self._drawn.wait().tolist(), strict=True))
        redrawn = self._redraw(outcomes)
        logprobs = self._read_logprobs()
        logprobs |= self._score_again([i for i in self._scored if i in redrawn], outcomes)
        return [
            Draw.of(int(outcomes[i][0]), outcomes[i][1], logprobs.get(i), is_late=i in redrawn)
            for i in range(len(self._rows))
        ]

    def _launch_logprobs(self, tokens: Tensor) -> None:
        """``tokens`` [R] are in the groups' order."""
        places = [p for p, i in enumerate(self._order) if self._rows[i].logprobs is not None]
        self._scored = [self._order[place] for place in places]
        if places:
            index = to_device(torch.tensor(places), tokens.device)
            self._scores = self._score(self._scored, tokens[index])

    def _score(self, members: list[int], tokens: Tensor) -> PendingLogprobs:
        rows = [self._rows[i] for i in members]
        logits = _take(self._logits, [row.logits_row for row in rows], is_changed=False)
        return launch_logprobs(logits, tokens, alternatives=any(row.logprobs for row in rows))

    def _redraw(self, outcomes: dict[int, list[float]]) -> set[int]:
        """Settles the rows whose candidates did not suffice, group by group; their indices."""
        redrawn: set[int] = set()
        for group in self._groups:
            places = [p for p, i in enumerate(group.members) if not outcomes[i][2]]
            if places:
                members = [group.members[place] for place in places]
                outcomes.update(zip(members, group.redraw(places).tolist(), strict=True))
                redrawn.update(members)
        return redrawn

    def _read_logprobs(self) -> dict[int, RawLogprob]:
        if self._scores is None:
            return {}
        return dict(
            zip(self._scored, self._scores.on_host(self._wanted(self._scored)), strict=True)
        )

    def _score_again(
        self, members: list[int], outcomes: dict[int, list[float]]
    ) -> dict[int, RawLogprob]:
        if not members:
            return {}
        tokens = torch.tensor([int(outcomes[i][0]) for i in members], device=self._logits.device)
        scores = self._score(members, tokens)
        return dict(zip(members, scores.on_host(self._wanted(members)), strict=True))

    def _wanted(self, members: list[int]) -> list[int]:
        return [self._rows[i].logprobs or 0 for i in members]


def _draw(kind: Kind, logits: Tensor, settings: list[DrawSettings]) -> Tensor:
    if kind is Kind.GREEDY:
        return pick_largest(logits)
    if kind is Kind.UNFILTERED:
        return draw_by_id(logits, settings)
    is_small = all(row.top_k < _FEW for row in settings)
    return draw_by_rank(logits, settings, _FEW if is_small else _MANY)


def _take(logits: Tensor, rows: list[int], *, is_changed: bool) -> Tensor:
    """[n, V]: a view where the rows lie side by side and nobody writes to it, else a copy."""
    if rows == list(range(rows[0], rows[0] + len(rows))):
        view = logits[rows[0] : rows[0] + len(rows)]
        return view.clone() if is_changed else view
    return logits[to_device(torch.tensor(rows), logits.device)]
