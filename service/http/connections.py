"""Every open connection: who gives way when there are too many, whose reader has gone silent."""

from __future__ import annotations

import resource
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Protocol

RESERVED = 256  # descriptors that are no client's: files, the engine, listeners
SPARE = 64  # of those, connections over the limit that are heard so far as to be refused
DEFAULT_LIMIT = 65_536  # where the system would allow more: each idle one costs about 10 KiB
REASONS = (  # for which this side cuts a connection short
    *("gave_way", "no_room", "no_handshake", "malformed"),
    *("head_timeout", "linger_timeout", "write_timeout"),
)


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a client may take, in seconds."""

    head: float = 10.0  # over a request's head, or over TLS
    write: float = 60.0  # without taking a byte of its answer
    linger: float = 5.0  # over the rest of a body that was answered before it had come


class Connection(Protocol):
    def give_way(self) -> None:
        """End at once; no request is being answered."""

    def is_stalled(self, now: float, patience: float) -> bool:
        """Whether it has had output for so long and took none of it."""

    @property
    def has_output(self) -> bool: ...

    def abort(self) -> None: ...


@dataclass
class Connections:
    """The book of one listener.

    At the limit whoever waits longest for its next request gives way to a newcomer: a client
    must reckon with that on any kept connection. Where all are being answered, newcomers are
    taken as extra ones, which get a 503 for all but health checks; of those too the one that
    waits longest gives way.
    """

    limit: int = DEFAULT_LIMIT
    patience: Patience = field(default_factory=Patience)
    ended: Counter[str] = field(default_factory=Counter)  # by reason, what this side cut short
    _open: set[Connection] = field(default_factory=set)
    _extra: set[Connection] = field(default_factory=set)
    _waiting: dict[Connection, None] = field(default_factory=dict)  # the longest first
    _writing: set[Connection] = field(default_factory=set)  # answered, or not yet flushed

    @property
    def num_open(self) -> int:
        return len(self._open) + len(self._extra)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def admit(self, newcomer: Connection) -> bool:
        """Take it in, as an extra one if it must be; False where there is no room even so."""
        if len(self._open) >= self.limit:
            self.make_room(self._open)
        if len(self._open) < self.limit:
            self._open.add(newcomer)
        else:
            if len(self._extra) >= SPARE and not self.make_room(self._extra):
                self.ended["no_room"] += 1
                return False
            self._extra.add(newcomer)
        self._waiting[newcomer] = None
        return True

    def make_room(self, among: set[Connection] | None = None) -> bool:
        """End the one that has waited longest, if any waits."""
        group = self._open if among is None else among
        for connection in self._waiting:
            if connection in group:
                self.ended["gave_way"] += 1
                self.close(connection)
                connection.give_way()
                return True
        return False

    def is_extra(self, connection: Connection) -> bool:
        return connection in self._extra

    def wait(self, connection: Connection) -> None:
        """It waits for its next request, from now on."""
        if connection in self._open or connection in self._extra:
            self._waiting.pop(connection, None)
            self._waiting[connection] = None

    def answer(self, connection: Connection) -> None:
        """A request of its is being answered."""
        self._waiting.pop(connection, None)
        self._writing.add(connection)

    def close(self, connection: Connection) -> None:
        self._open.discard(connection)
        self._extra.discard(connection)
        self._waiting.pop(connection, None)
        if not connection.has_output:
            self._writing.discard(connection)

    def forget(self, connection: Connection) -> None:
        """It is gone, with whatever it had not sent."""
        self.close(connection)
        self._writing.discard(connection)

    def end_stalled(self) -> None:
        """Abort whoever has taken nothing of its answer for too long; to be called often."""
        now = time.monotonic()
        for connection in list(self._writing):
            if connection.is_stalled(now, self.patience.write):
                self.ended["write_timeout"] += 1
                connection.abort()
            elif not connection.has_output and connection in self._waiting:
                self._writing.discard(connection)


class TooFewDescriptors(ValueError):
    """The system does not let this process hold as many connections."""


def connection_limit(wanted: int | None) -> int:
    """Raise the soft limit of descriptors as far as needed and allowed; how many are clients'.

    Raises ``TooFewDescriptors`` where more are wanted than can be had.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = hard if hard != resource.RLIM_INFINITY else 1 << 30
    reserved = min(RESERVED, most // 4)
    if wanted is not None and wanted + reserved > most:
        raise TooFewDescriptors(
            f"max-connections {wanted} needs {wanted + reserved} file descriptors and this process "
            f"may have {most}: raise the limit (ulimit -n, LimitNOFILE) or ask for fewer"
        )
    limit = wanted or min(DEFAULT_LIMIT, most - reserved)
    needed = limit + reserved
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    return limit
