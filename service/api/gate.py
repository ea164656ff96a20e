"""Who is let in to be read: what no engine has room for is refused before it costs anything.

The engine's queue is the bound that counts and its refusal the one that is exact. This one stands
before it, on what the engine said last, so that a flood costs neither reading nor tokenizing, and
so that no more requests are between their last byte and the engine's answer than it could take.
"""

from __future__ import annotations

from service.api.exchange import Caller, Exchange
from service.engine.messages import State
from service.errors import Overloaded
from service.registry import ModelRegistry


def _room(state: State, caller: Caller) -> int:
    """A queue that others have filled has room left for who has less than its share of it."""
    return state.room or (0 if caller.id in state.crowding else state.spare_room)


class Gate:
    """``num_entering``: requests whose body is here and which no engine has taken yet."""

    def __init__(self, models: ModelRegistry, most_entering: int) -> None:
        """``most_entering`` also bounds what asks no engine for room: tokenizing, estimates."""
        self.num_entering = 0
        self._models = models
        self._most = most_entering

    def check(self, caller: Caller) -> None:
        """Raises ``Overloaded`` where its request for tokens would find no room."""
        states = [
            engine.state
            for model in self._models.models
            for engine in model.engines
            if engine.is_ready
        ]
        if states and self.num_entering >= sum(_room(state, caller) for state in states):
            raise Overloaded(
                "The queue is full. Try again after the time in Retry-After.",
                retry_after=min(state.retry_after for state in states),
            )

    def enter(self, exchange: Exchange) -> None:
        """Its body is here; whoever only promises one holds no place. Raises ``Overloaded``."""
        if exchange.is_generation:
            self.check(exchange.caller)
        elif self.num_entering >= self._most:
            raise Overloaded(
                f"{self._most} requests are being read. Try again after the time in Retry-After.",
                retry_after=1.0,
            )
        exchange.is_entering = True
        self.num_entering += 1

    def leave(self, exchange: Exchange) -> None:
        """An engine has taken it, or it has ended."""
        if exchange.is_entering:
            exchange.is_entering = False
            self.num_entering -= 1
