"""One HTTP exchange, from first byte to last: what the middlewares and routes share of it."""

from __future__ import annotations

import re
import time
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from starlette.types import Scope

from service.api.meter import Meter

if TYPE_CHECKING:
    from service.keys.limits import KeyLimits
    from service.tracing.request_trace import RequestTrace

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
REFUSALS = (503, 529)  # of a server that could not take it
KEY = "pronk.exchange"  # in the ASGI scope
OVER_LIMIT = "pronk.over_limit"  # in its state, where the connection is one too many

Outcome = Literal["finished", "failed", "cancelled", "rejected"]


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls, as the key says; without keys everybody is the one nameless caller."""

    id: str = ""  # of the key, never the key itself
    name: str = ""  # the operator's word for it: labels and the ledger
    weight: float = 1.0  # its share of the device beside other callers
    is_admin: bool = False
    models: frozenset[str] | None = None  # it may use, adapters among them; None: all


NOBODY = Caller()


@dataclass(slots=True)
class Exchange:
    """``outcome`` is set by what ends a generation early; the status decides otherwise."""

    request_id: str
    arrival: float = field(default_factory=time.monotonic)
    started: int = field(default_factory=time.time_ns)  # the same moment, since the epoch
    ended: float = 0.0  # time.monotonic()
    caller: Caller = NOBODY
    is_recorded: bool = False  # one line of the usage ledger is its
    limits: KeyLimits | None = None  # of the caller's key
    is_generation: bool = False  # counted in received = finished + failed + cancelled + rejected
    is_entering: bool = False  # its body is here, and no engine has taken it yet
    outcome: Outcome | None = None
    status: int | None = None
    meter: Meter = field(default_factory=Meter)
    trace: RequestTrace | None = None

    @property
    def age(self) -> float:
        return time.monotonic() - self.arrival

    def settle(self) -> Outcome:
        """How it ended, for the books: exactly one of the four."""
        if self.outcome is not None:
            return self.outcome
        if self.status is None:
            return "failed"
        if self.status < 400:
            return "finished"
        return "rejected" if self.status < 500 or self.status in REFUSALS else "failed"


def request_id(scope: Scope) -> str:
    """The client's ``X-Request-Id`` if it is a plain one, else a new one."""
    values = [value for name, value in scope["headers"] if name == b"x-request-id"]
    text = values[0].decode("latin-1") if len(values) == 1 else ""
    return text if REQUEST_ID.fullmatch(text) else f"req-{uuid.uuid4().hex}"


def exchange_of(scope: Scope) -> Exchange:
    found = scope.get(KEY)
    assert isinstance(found, Exchange), "the edge middleware runs before every route"
    return found


def route_path(scope: Scope) -> str:
    """The path the router will match: without the root path a proxy strips."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    if root and path.startswith(root) and path[len(root) : len(root) + 1] in ("", "/"):
        return path[len(root) :]
    return path
