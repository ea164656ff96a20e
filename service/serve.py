"""``pronk serve``: from settings to a listening server, and from SIGTERM to a clean end.

The listener is up before the model is: `/readyz` tells stage and progress while it loads. SIGTERM
drains: `/readyz` turns 503 at once, requests go on being served for ``drain_delay`` seconds (the
time a balancer takes to notice), then new ones are refused and running ones get ``drain_timeout``.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import time
from collections.abc import Coroutine

import uvicorn
import uvloop

from service import presentation
from service.backend import Backend, ServeProblem, Source, find_model, usage_ledger
from service.crashes import forbid_core_dumps, log_loop_failure, log_uncaught
from service.engine.messages import State
from service.http import listener
from service.http.acceptor import HttpServer
from service.http.connections import Connections, Patience, TooFewDescriptors, connection_limit
from service.ledger.ledger import Ledger
from service.ledger.location import LedgerProblem
from service.logs import configure_logging
from service.settings import Settings
from service.tracing.exporting import Tracing, TracingProblem, traced

logger = logging.getLogger("pronk")

ECHO = 0.25  # seconds: a wrapper that passes on a signal its group got too sends it twice
LINGER = 2  # seconds for answers already written to reach their clients
LAST_WORDS = 0.5  # seconds after a second signal for answers to say that the engine ended


def serve_until_stopped(settings: Settings) -> int:
    """Serve until a signal; the exit code. Raises ``ServeProblem`` with one clear line."""
    configure_logging(settings.log_level, settings.log_format, has_content=settings.log_content)
    log_uncaught()
    forbid_core_dumps()
    source = find_model(settings.model)
    try:
        socket = listener.bind(settings)
    except listener.CannotListen as error:
        raise ServeProblem(str(error)) from None
    try:
        # Closed last: the loop's end closes exchanges, and each still writes its record.
        with (
            contextlib.closing(socket),
            usage_ledger(settings) as ledger,
            traced(settings.otlp_traces_endpoint) as tracing,
            asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
        ):
            return runner.run(Server(settings, source, socket, ledger, tracing).run())
    except (LedgerProblem, TracingProblem) as problem:
        raise ServeProblem(str(problem)) from None


class Server(Backend):
    """One HTTP process with its engine, from start to end."""

    def __init__(
        self,
        settings: Settings,
        source: Source,
        socket: listener.Socket,
        ledger: Ledger | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        super().__init__(settings, source, ledger, tracing)
        self.socket = socket
        self.http = HttpServer(self._uvicorn_config(), self._book())
        self.code = 0
        self._signals = 0
        self._first_signal = 0.0
        self._tasks: set[asyncio.Task[None]] = set()

    def _uvicorn_config(self) -> uvicorn.Config:
        return uvicorn.Config(
            self.app,
            http="h11",  # httptools accepts headers without bound
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            root_path=self.settings.root_path,
            ssl_keyfile=self.settings.ssl_keyfile,
            ssl_certfile=self.settings.ssl_certfile,
            timeout_keep_alive=self.settings.keep_alive,
            timeout_graceful_shutdown=LINGER,
        )

    def _book(self) -> Connections:
        patience = Patience(head=self.settings.header_timeout, write=self.settings.write_timeout)
        try:
            limit = connection_limit(self.settings.max_connections)
        except TooFewDescriptors as error:
            raise ServeProblem(str(error)) from None
        book = Connections(limit, patience)
        self.app.state.server.metrics.watch_connections(book)
        return book

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(log_loop_failure)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        self.engine.observers.append(self._on_engine)
        logger.info("listening on %s", listener.address(self.settings, self.socket))
        if self.app.state.server.keyring.is_open and not listener.is_local(self.socket):
            logger.warning("without keys whoever reaches it may use all of it: --api-keys-file")
        self._spawn(self._bring_up())
        self._spawn(self.app.state.server.keyring.watch())
        try:
            await self.http.serve(sockets=[self.socket])
        finally:
            for task in self._tasks:
                task.cancel()
            await self.engine.stop()
            await self._last_words()
        logger.info("stopped")
        return self.code

    async def _last_words(self) -> None:
        """One error in its envelope for everybody: what the loop's end cancels says less."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_WORDS):
                await self.app.state.server.all_answered.wait()

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # ---- up

    async def _bring_up(self) -> None:
        try:
            await self.load()
        except ServeProblem as problem:
            self._give_up(str(problem))
            return
        except Exception:  # a bug: a server that never gets ready would be worse than none
            logger.exception("unforeseen failure while loading")
            self._give_up(f"cannot serve {self.source.reference}: unforeseen failure, traced above")
            return
        freeze()
        presentation.banner(self.settings, self.model, self.engine.state, self.plan, self.socket)
        wants_sample = self.settings.sample
        if wants_sample or (wants_sample is None and self.source.is_bundled):
            await presentation.sample(self.app)

    def _on_engine(self, message: object) -> None:
        """An engine that will not come back ends the server: its keeper can start it anew."""
        if isinstance(message, State) and message.stage == "failed":
            self._give_up(f"the engine failed: {message.reason}")

    def _give_up(self, reason: str) -> None:
        if self.code == 0 and not self._signals:
            logger.error(reason)
            self.code = 1
            self.http.should_exit = True

    # ---- down

    def _on_signal(self, number: int) -> None:
        now = time.monotonic()
        if self._signals and now - self._first_signal < ECHO:
            return
        self._signals += 1
        if self._signals == 1:
            self._first_signal = now
            self._spawn(self._drain())
            return
        logger.warning("second signal: ending at once")
        self.code = 128 + number
        self.http.force_exit = True
        self.http.should_exit = True

    async def _drain(self) -> None:
        self.app.state.draining = True
        running = self.engine.num_unfinished
        logger.info("draining: %d requests are running", running)
        await asyncio.sleep(self.settings.drain_delay)
        try:
            async with asyncio.timeout(self.settings.drain_timeout):
                await self.engine.drain()
                await self.app.state.server.all_answered.wait()  # beams between two rounds too
        except TimeoutError:
            logger.warning(
                "%d requests did not finish within %g s: ending them",
                self.engine.num_unfinished,
                self.settings.drain_timeout,
            )
            await self.engine.stop()  # each client gets its one terminal event
        self.http.should_exit = True


def freeze() -> None:
    """What is here once all is loaded stays: collections pass it by, or each would hold every
    stream up for as long as it takes to look at it (21 ms for the bundled model, idle)."""
    gc.collect()
    gc.freeze()
