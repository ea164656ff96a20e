"""Whoever shares the device with others: a key."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class Account:
    """``level`` is what the device did for it, by its weight (``service.engine.fair_share``).

    ``turn`` counts up: of two at one level the newer goes first, because the other's sequences
    run already.
    """

    name: str
    weight: float = 1.0
    level: float = 0.0
    turn: int = 0
    num_requests: int = 0  # unfinished
    stuck_at: float | None = None  # ``FairShare.work`` when its next sequence first found no room


def rank(account: Account) -> tuple[float, int]:
    """The lowest goes first."""
    return account.level, -account.turn
