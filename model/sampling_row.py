"""How one row is drawn, and what came of it: the words the sampler and its callers share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum

from torch import Tensor

from model.drawing import DrawSettings
from model.grammar_masks import Words
from model.logprobs import RawLogprob
from model.penalties import PenaltyState
from model.random_draws import uniform

GREEDY_BELOW = 1e-5  # vLLM's; smaller temperatures leave the largest logit alone anyway


class Kind(IntEnum):
    """As the compiled sampler numbers them."""

    GREEDY = 0
    UNFILTERED = 1
    FILTERED = 2


class DrawError(StrEnum):
    """Why a row could not be drawn: that row fails, its neighbours do not."""

    NOT_FINITE = "the model's logits are not finite"
    NOTHING_ALLOWED = "no token is left to draw: all are banned or not allowed"


@dataclass(slots=True)
class Packed:
    """Room for the settings of a row as the compiled sampler reads them, made at the first draw.

    Kept by who draws from the same settings at every step. Nothing of it changes with the row's
    ``logits_row``, ``position``, ``banned``, ``mask`` and penalty counts; with any other field
    it is stale.
    """

    settings: bytes = b""
    kept: list[Tensor] = field(default_factory=list)  # whose addresses are among them


@dataclass(slots=True)
class SamplingRow:
    """How one row is drawn. Fields mean what the wire's say.

    ``prompt`` and ``output`` are read only where a penalty is set and ``penalties`` is not given:
    keep a ``PenaltyState`` for each penalised sequence, so that no step reads a long prompt again.
    A long ``allowed`` may be an int64 tensor, for the same reason.
    """

    logits_row: int  # which row of the logits; several may share one
    seed: int = 0
    choice: int = 0
    position: int = 0  # index the drawn token will have in its sequence
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0 and -1 are off
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    allowed: Sequence[int] | Tensor | None = None
    banned: Sequence[int] = ()
    prompt: Sequence[int] = ()
    output: Sequence[int] = ()
    penalties: PenaltyState | None = None
    mask: Words | None = None  # what a grammar allows, see model.grammar_masks
    logprobs: int | None = None  # alternatives besides the drawn token; None is off
    packed: Packed | None = None

    def kind(self, vocab_size: int) -> Kind:
        if self.temperature < GREEDY_BELOW:
            return Kind.GREEDY
        if self.top_p < 1.0 or self.min_p > 0.0 or 0 < self.top_k < vocab_size:
            return Kind.FILTERED
        return Kind.UNFILTERED

    def draw_settings(self, vocab_size: int) -> DrawSettings:
        return DrawSettings(
            uniform=uniform(self.seed, self.choice, self.position),
            inverse_temperature=1.0 / max(self.temperature, GREEDY_BELOW),
            top_k=self.top_k if 0 < self.top_k < vocab_size else vocab_size,
            top_p=self.top_p,
            log_min_p=math.log(self.min_p) if self.min_p > 0.0 else -math.inf,
        )


@dataclass(frozen=True, slots=True)
class Draw:
    """``token`` is -1 where there is an ``error``.

    ``is_late`` where it was settled by ``collect``: ``Drawn.tokens`` has another one.
    """

    token: int
    logprob: RawLogprob | None = None
    error: DrawError | None = None
    is_late: bool = False

    @classmethod
    def of(
        cls, token: int, best: float, logprob: RawLogprob | None, *, is_late: bool = False
    ) -> Draw:
        """``best`` is the largest logit drawn from: how a row that cannot be drawn is told."""
        if best == -math.inf:
            return cls(-1, error=DrawError.NOTHING_ALLOWED)
        if not math.isfinite(best) or (logprob is not None and math.isnan(logprob.logprob)):
            return cls(-1, error=DrawError.NOT_FINITE)
        return cls(token, logprob, is_late=is_late)
