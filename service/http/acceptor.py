"""Taking connections from the listening socket, so that none is outside the book.

An event loop's own server would hold connections in the middle of TLS's greeting without bound, and
knows nothing to do where descriptors run out.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import socket as sockets
import ssl
from collections.abc import Callable, Iterator

import uvicorn

from service.http.connections import Connections
from service.http.protocol import HttpProtocol

logger = logging.getLogger("pronk.http")

BATCH = 64  # accepted at a turn, between which requests are answered
PAUSE = 0.1  # seconds without accepting where the system has no descriptor left
SWEEPS = 4  # looks for stalled readers within one write timeout
UNSENT = 64 << 10  # bytes the system takes before the peer's window has room for them
PROBES = {  # a peer that vanished is known within a minute
    "TCP_KEEPIDLE": 30,
    "TCP_KEEPINTVL": 10,
    "TCP_KEEPCNT": 3,
}


class Acceptor:
    """One listening socket's connections, from their acceptance to their protocol.

    ``close`` and ``wait_closed`` are those of ``asyncio.Server``, for uvicorn.
    """

    def __init__(
        self,
        socket: sockets.socket,
        make_protocol: Callable[[], HttpProtocol],
        book: Connections,
        tls: ssl.SSLContext | None,
    ) -> None:
        self.socket = socket
        self.make_protocol = make_protocol
        self.book = book
        self.tls = tls
        self.loop = asyncio.get_running_loop()
        self._tasks: dict[asyncio.Task[None], HttpProtocol] = {}
        self._timers: dict[str, asyncio.TimerHandle] = {}

    def start(self) -> None:
        self.socket.setblocking(False)
        self.loop.add_reader(self.socket, self._accept)
        self._sweep()

    def close(self) -> None:
        self.loop.remove_reader(self.socket)
        for timer in self._timers.values():
            timer.cancel()
        for protocol in list(self._tasks.values()):
            protocol.give_way()

    async def wait_closed(self) -> None:
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accept(self) -> None:
        for _ in range(BATCH):
            try:
                connection, _ = self.socket.accept()
            except (BlockingIOError, InterruptedError):
                return
            except ConnectionAbortedError:
                continue
            except OSError as error:
                self._pause(error)
                return
            self._admit(connection)

    def _pause(self, error: OSError) -> None:
        """No descriptor is left: wait a little, and let one idle connection go meanwhile."""
        logger.warning("no connection can be taken: %s", error.strerror)
        pause = 0.01 if self.book.make_room() else PAUSE
        self.loop.remove_reader(self.socket)
        self._timers["pause"] = self.loop.call_later(
            pause, self.loop.add_reader, self.socket, self._accept
        )

    def _admit(self, connection: sockets.socket) -> None:
        protocol = self.make_protocol()
        if not self.book.admit(protocol):
            connection.close()
            return
        connection.setblocking(False)
        self._prepare(connection)
        task = self.loop.create_task(self._connect(connection, protocol))
        protocol.handshake = task
        self._tasks[task] = protocol
        task.add_done_callback(functools.partial(self._connected, connection, protocol))

    async def _connect(self, connection: sockets.socket, protocol: HttpProtocol) -> None:
        """Over when the protocol has its connection. Raises where the peer spoke no TLS."""
        patience = self.book.patience
        times = (patience.head, patience.linger) if self.tls is not None else (None, None)
        await self.loop.connect_accepted_socket(
            lambda: protocol,
            connection,
            ssl=self.tls,
            ssl_handshake_timeout=times[0],
            ssl_shutdown_timeout=times[1],
        )

    def _connected(
        self, connection: sockets.socket, protocol: HttpProtocol, task: asyncio.Task[None]
    ) -> None:
        """Or not: a task that gave way before its first turn never ran at all."""
        del self._tasks[task]
        failure = None if task.cancelled() else task.exception()
        if task.cancelled() or failure is not None:
            self.book.ended["no_handshake"] += 1
            self.book.forget(protocol)
            connection.close()
        if failure is not None and not isinstance(failure, OSError):
            logger.error("a connection could not be taken", exc_info=failure)

    def _prepare(self, connection: sockets.socket) -> None:
        """Peers that vanish are found out, and those that do not read fill no memory here."""
        if connection.family == sockets.AF_UNIX:
            return
        options = PROBES | {
            "TCP_NODELAY": 1,
            "TCP_NOTSENT_LOWAT": UNSENT,
            "TCP_USER_TIMEOUT": int(self.book.patience.write * 2000),  # after the book's
        }
        for name, value in options.items():
            if hasattr(sockets, name):  # some are Linux's alone
                connection.setsockopt(sockets.IPPROTO_TCP, getattr(sockets, name), value)
        connection.setsockopt(sockets.SOL_SOCKET, sockets.SO_KEEPALIVE, 1)

    def _sweep(self) -> None:
        self.book.end_stalled()
        self._timers["sweep"] = self.loop.call_later(self.book.patience.write / SWEEPS, self._sweep)


class HttpServer(uvicorn.Server):
    """uvicorn on connections of pronk's own taking, without its signal handlers: draining is
    pronk's, and so is the exit code."""

    def __init__(self, config: uvicorn.Config, book: Connections) -> None:
        super().__init__(config)
        self.book = book

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[sockets.socket] | None = None) -> None:
        assert sockets, "the listening sockets are bound before"
        await self.lifespan.startup()
        self.servers = []
        for socket in sockets:
            acceptor = Acceptor(socket, self._make_protocol, self.book, self.config.ssl)
            acceptor.start()
            self.servers.append(acceptor)  # type: ignore[arg-type]
        self.started = True

    def _make_protocol(self) -> HttpProtocol:
        return HttpProtocol(self.config, self.server_state, self.lifespan.state, book=self.book)
