"""Who is let in to be read: what no engine has room for is refused before it costs anything.

The engine's queue is the bound that counts and its refusal the one that is exact. This one stands
before it, on what the engine said last, so that a flood costs neither reading nor tokenizing, and
so that no more requests are between their last byte and the engine's answer than it could take.
"""

from __future__ import annotations

from collections import Counter

from service.api.exchange import Exchange
from service.engine.messages import State
from service.errors import Overloaded
from service.registry import ModelRegistry


class Gate:
    """Counts requests whose body is here and which no engine has taken yet, by account."""

    def __init__(self, models: ModelRegistry, most_reading: int) -> None:
        """``most_reading`` bounds what asks no engine for room: tokenizing, estimates."""
        self.entering: Counter[str] = Counter()
        self.reading: Counter[str] = Counter()
        self._models = models
        self._most = most_reading

    def check(self, account: str) -> None:
        """Raises ``Overloaded`` where a request for tokens would find no room.

        A full engine still takes what an account below its share sends, and so does the gate: one
        account's requests on their way shut nobody else out.
        """
        states = [
            engine.state
            for model in self._models.models
            for engine in model.engines
            if engine.is_ready
        ]
        if not states or self.entering.total() < (room := sum(state.room for state in states)):
            return
        seconds = [waiting_time(state, account) for state in states]
        is_open = bool(room) or None in seconds  # others may have filled what is open to this one
        places, least_accounts = (room, 1) if room else (self._most, 2)
        if is_open and _is_below_share(self.entering, account, places, least_accounts):
            return
        raise Overloaded(
            "The queue is full. Try again after the time in Retry-After.",
            retry_after=min(
                state.retry_after if one is None else one
                for state, one in zip(states, seconds, strict=True)
            ),
        )

    def enter(self, exchange: Exchange) -> None:
        """Its body is here; whoever only promises one holds no place. Raises ``Overloaded``."""
        account = exchange.caller.id
        if exchange.is_generation:
            self.check(account)
        elif self.reading.total() >= self._most and not _is_below_share(
            self.reading, account, self._most
        ):
            raise Overloaded(
                f"{self._most} requests are being read. Try again after the time in Retry-After.",
                retry_after=1.0,
            )
        exchange.is_entering = True
        self._counter(exchange)[account] += 1

    def leave(self, exchange: Exchange) -> None:
        """An engine has taken it, or it has ended."""
        if not exchange.is_entering:
            return
        exchange.is_entering = False
        account, counter = exchange.caller.id, self._counter(exchange)
        counter[account] -= 1
        if not counter[account]:
            del counter[account]

    def _counter(self, exchange: Exchange) -> Counter[str]:
        return self.entering if exchange.is_generation else self.reading


def _is_below_share(
    counter: Counter[str], account: str, places: int, least_accounts: int = 1
) -> bool:
    """Of ``places`` beside the other accounts there; for all of them twice as many are the end."""
    accounts = max(len(counter.keys() | {account}), least_accounts)
    return counter[account] < max(1, places // accounts) and counter.total() < 2 * places


def waiting_time(state: State, account: str) -> float | None:
    """Seconds until that engine should take a request of the account; None: it may right now."""
    return state.retry_after if state.is_shut else state.refused.get(account)
