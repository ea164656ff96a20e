"""What every route needs of the server around it."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import random
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from starlette.datastructures import State as AppState
from starlette.requests import Request

from service.api.exchange import Exchange, exchange_of
from service.api.gate import Gate
from service.errors import AdminRequired
from service.keys.keyring import Keyring
from service.keys.limits import Limits
from service.keys.metrics import KeyMetrics
from service.ledger.ledger import Ledger
from service.metrics import Metrics
from service.registry import ModelRegistry, draining
from service.settings import Settings


@dataclass
class Server:
    """One for each app. ``flags`` is the app's state: whoever runs the server sets ``draining``.

    /readyz is then 503 at once. New work is refused at once too, or, where a balancer is given
    ``drain_delay`` seconds to notice, when the engine is told to drain.
    """

    settings: Settings
    models: ModelRegistry
    metrics: Metrics
    flags: AppState
    keyring: Keyring
    limits: Limits
    key_metrics: KeyMetrics
    gate: Gate
    ledger: Ledger | None = None
    seeds: random.Random = field(default_factory=random.SystemRandom)
    secret: bytes = field(default_factory=lambda: secrets.token_bytes(32), repr=False)
    num_open: int = 0  # answers on their way, those between two rounds or waves included
    all_answered: asyncio.Event = field(default_factory=asyncio.Event)
    adapters_lock: asyncio.Lock = field(default_factory=asyncio.Lock)  # one change at a time

    def __post_init__(self) -> None:
        self.all_answered.set()
        self.flags.draining = False
        self.flags.server = self
        if self.settings.seed is not None:
            self.seeds = random.Random(self.settings.seed)

    @property
    def is_draining(self) -> bool:
        return bool(self.flags.draining)

    @property
    def is_refusing(self) -> bool:
        return self.is_draining and self.settings.drain_delay == 0

    def receive(self, request: Request) -> Exchange:
        """Open the books on a request for tokens, before its body is read.

        Raises ``Unavailable`` where none is taken, ``Overloaded`` where it would find no room.
        """
        exchange = exchange_of(request.scope)
        exchange.is_recorded = True
        self.metrics.receive(exchange)
        if self.is_refusing:
            raise draining()
        self.gate.check(exchange.caller.id)
        return exchange

    def require_admin(self, request: Request) -> None:
        """Raises ``AdminRequired``, but on a server without keys."""
        if not self.keyring.is_open and not exchange_of(request.scope).caller.is_admin:
            raise AdminRequired("This takes a key with admin rights; the caller's has none.")

    @contextmanager
    def answering(self) -> Iterator[None]:
        """An answer is on its way: draining waits for it."""
        self.num_open += 1
        self.all_answered.clear()
        try:
            yield
        finally:
            self.num_open -= 1
            if not self.num_open:
                self.all_answered.set()

    def namespace(self, key_id: str, salt: str | None) -> bytes:
        """Who may share cached prefixes: the caller's key, narrowed by the request's salt.

        One code under the other: no salt can be made to spell another key's namespace.
        """
        own = hmac.new(self.secret, key_id.encode(), hashlib.sha256).digest()
        return hmac.new(own, (salt or "").encode(), hashlib.sha256).digest()


def server_of(request: Request) -> Server:
    server = request.app.state.server
    assert isinstance(server, Server)
    return server
