"""``pronk serve``: from settings to a listening server, and from SIGTERM to a clean end.

The listener is up before the model is: `/readyz` tells stage and progress while it loads. SIGTERM
drains: `/readyz` turns 503 at once, requests go on being served for ``drain_delay`` seconds (the
time a balancer takes to notice), then new ones are refused and running ones get ``drain_timeout``.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import logging
import signal
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path

import uvicorn
import uvloop
from fastapi import FastAPI

from service import presentation
from service.api.app import create_app
from service.crashes import forbid_core_dumps, log_loop_failure, log_uncaught
from service.engine.client import EngineClient
from service.engine.cores import CorePlan, hold, plan_cores, weights_bytes
from service.engine.messages import State
from service.engine.options import EngineOptions
from service.engine.supervisor import Patience as EnginePatience
from service.errors import EngineFailure
from service.http import listener
from service.http.acceptor import HttpServer
from service.http.connections import Connections, Patience, TooFewDescriptors, connection_limit
from service.keys.file import KeysProblem
from service.ledger.ledger import Ledger
from service.ledger.location import LedgerProblem, kept
from service.logs import configure_logging
from service.registry import (
    ModelRegistry,
    ServedAdapter,
    ServedModel,
    adapter_fingerprint,
    fingerprint,
)
from service.settings import Settings
from service.tracing.exporting import Tracing, TracingProblem, traced

logger = logging.getLogger("pronk")

ECHO = 0.25  # seconds: a wrapper that passes on a signal its group got too sends it twice
LINGER = 2  # seconds for answers already written to reach their clients
LAST_WORDS = 0.5  # seconds after a second signal for answers to say that the engine ended
UNKNOWN_LENGTH = 1 << 30  # before a checkpoint was read
DTYPES = {"float": "float32", "half": "float16"}  # vLLM's other spellings


class ServeProblem(RuntimeError):
    """The server cannot start or go on; the text says why in one line."""


@dataclass(frozen=True)
class Source:
    """Where the model comes from. ``path`` is None for a hub id that must be fetched first."""

    reference: str
    path: Path | None
    is_bundled: bool = False

    @property
    def name(self) -> str:
        """The hub id, or the folder's or file's own name."""
        if self.is_bundled:
            return "pronk"
        if self.path is None:
            return self.reference
        resolved = self.path.resolve()
        return resolved.stem if resolved.suffix == ".gguf" else resolved.name


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


def usage_ledger(
    settings: Settings, *, by_default: bool = True
) -> contextlib.AbstractContextManager[Ledger | None]:
    """Entering it raises ``LedgerProblem`` where one was asked for and cannot be kept."""
    return kept(
        settings.ledger,
        max_records=settings.ledger_records,
        max_days=settings.ledger_days,
        by_default=by_default,
    )


def find_model(reference: str | None) -> Source:
    """Say what ``reference`` is without touching the network."""
    if reference is None:
        from model.bundled import bundled_model_path

        return Source("pronk", bundled_model_path(), is_bundled=True)
    path = Path(reference).expanduser()
    if path.exists():
        return Source(reference, path)
    from model.checkpoint.hub import is_hub_id

    if is_hub_id(reference):
        return Source(reference, None)
    raise ServeProblem(
        f"no model at {reference}: give a folder, a .gguf file or a hub id such as org/name"
    )


def core_plan(settings: Settings, source: Source) -> CorePlan:
    return plan_cores(
        settings.threads,
        may_pin=settings.cpu_affinity,
        device=settings.device,
        model_bytes=weights_bytes(source.path) if source.path is not None else 0,
    )


def engine_options(
    settings: Settings, source: Source, plan: CorePlan, draft: Source | None = None
) -> EngineOptions:
    return EngineOptions(
        model=str(source.path or ""),
        socket="",  # the supervisor makes one
        device=settings.device,
        dtype=DTYPES.get(settings.dtype, settings.dtype),
        quantization=settings.quantization,
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        block_size=settings.block_size,
        num_kv_blocks=settings.num_kv_blocks,
        kv_cache_memory=settings.kv_cache_memory,
        kv_cache_dtype=settings.kv_cache_dtype,
        host_cache_memory=settings.host_cache_memory,
        gpu_memory_utilization=settings.gpu_memory_utilization,
        enable_prefix_caching=settings.enable_prefix_caching,
        max_queued_requests=settings.max_queued_requests,
        max_queued_tokens=settings.max_queued_tokens,
        scheduling_policy=settings.scheduling_policy,
        threads=plan.threads,
        cpus=tuple(sorted(plan.engine or ())),
        async_scheduling=settings.async_scheduling,
        attention_backend=settings.attention_backend,
        speculative_model=str(draft.path or "") if draft is not None else None,
        num_speculative_tokens=settings.num_speculative_tokens,
        speculative_ngram_min=settings.speculative_ngram_min,
        speculative_ngram_max=settings.speculative_ngram_max,
        compile=settings.compile,
        compile_cache=str(settings.compile_cache) if settings.compile_cache else None,
        max_loras=settings.max_running_loras,
        max_lora_rank=settings.max_lora_rank,
        max_cpu_loras=settings.max_cpu_loras,
        adapters={name: str(folder.expanduser()) for name, folder in settings.adapters.items()},
        log_level=settings.log_level,
        log_format=settings.log_format,
        log_content=settings.log_content,
    )


def engine_patience(settings: Settings) -> EnginePatience:
    return EnginePatience(stalled_after=settings.watchdog_timeout, retry=settings.retry_timeout)


class Backend:
    """A model's engine and the app in front of it; whoever owns it brings it up and asks the app.

    ``pronk serve`` listens for it, ``pronk batch`` reads a file.
    """

    def __init__(
        self,
        settings: Settings,
        source: Source,
        ledger: Ledger | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        self.settings = settings
        self.source = source
        model = settings.speculative_model
        self.draft = None if model is None else find_model(model)
        self.plan = core_plan(settings, source)
        if self.plan.http is not None:
            hold(self.plan.http)
        options = engine_options(settings, source, self.plan, self.draft)
        self.engine = EngineClient(options, patience=engine_patience(settings))
        names = settings.served_model_name or [source.name]
        self.model = ServedModel(names, [self.engine], settings.max_model_len or UNKNOWN_LENGTH)
        if both := settings.adapters.keys() & set(names):
            raise ServeProblem(f"{min(both)} names both the model and an adapter")
        self.model.adapters = {
            name: ServedAdapter(name, folder.expanduser())
            for name, folder in settings.adapters.items()
        }
        try:
            self.app: FastAPI = create_app(settings, ModelRegistry([self.model]), ledger, tracing)
        except KeysProblem as problem:
            raise ServeProblem(str(problem)) from None

    async def load(self) -> None:
        """Ready when it returns. Raises ``ServeProblem`` with one clear line."""
        try:
            with presentation.loading(self.engine):
                await self._load()
                await self.engine.wait_ready()
        except (EngineFailure, ValueError, OSError) as error:
            raise ServeProblem(f"cannot serve {self.source.reference}: {error}") from None

    async def _load(self) -> None:
        path = await self._local(self.source)
        draft = None if self.draft is None else str(await self._local(self.draft))
        self.engine.set_model(str(path), draft)
        await self.engine.start()
        await asyncio.to_thread(describe, self.model, path, self.settings)

    async def _local(self, source: Source) -> Path:
        """Where it lies on this machine, fetched first where it is a hub id."""
        if source.path is not None:
            return source.path
        self.engine.announced(State(stage="loading", reason="fetching the checkpoint"))
        return await asyncio.to_thread(self._download, source)

    def _download(self, source: Source) -> Path:
        from model.checkpoint import hub

        is_draft = source is self.draft  # --revision names one of the model served
        return hub.resolve(
            source.reference,
            revision=None if is_draft else self.settings.revision,
            download_dir=self.settings.download_dir,
            offline=self.settings.offline,
        )


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


def describe(served: ServedModel, path: Path, settings: Settings) -> None:
    """Fill in what the checkpoint's small files tell: tokenizer, template, lengths, defaults."""
    from model.chat_template import load_chat_template
    from model.checkpoint import generation_defaults, load_config
    from model.tokenizer import load_tokenizer

    config = load_config(path)
    tokenizer = load_tokenizer(path)
    override = settings.chat_template
    served.chat_template = load_chat_template(tokenizer, override)
    served.max_model_len = settings.max_model_len or config.max_positions
    served.vocab_size = config.vocab_size
    served.hidden_size = config.hidden_size
    served.eos_token_ids = tuple(dict.fromkeys([*config.eos_token_ids, *tokenizer.eos_ids]))
    served.generation_defaults = generation_defaults(path)
    chosen: tuple[str, ...] = (settings.dtype, settings.device)
    if settings.quantization != "auto":
        chosen += (settings.quantization,)
    served.fingerprint = fingerprint(path, repr(chosen).encode())
    for name, adapter in served.adapters.items():
        own = adapter_fingerprint(served, adapter.folder)
        served.adapters[name] = dataclasses.replace(adapter, fingerprint=own)
    served.tokenizer = tokenizer  # last: its presence says that the rest is there
