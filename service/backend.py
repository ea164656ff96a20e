"""A model's engine and the app in front of it, for whoever owns them: a listener or a file.

From settings to where the model lies, to what the engine is told, and to what the checkpoint's
small files tell the app.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from dataclasses import dataclass
from pathlib import Path

from fastapi import FastAPI

from service import presentation
from service.api.app import create_app
from service.engine.client import EngineClient
from service.engine.cores import CorePlan, hold, plan_cores, weights_bytes
from service.engine.messages import State
from service.engine.options import EngineOptions
from service.engine.supervisor import Patience
from service.errors import EngineFailure
from service.keys.file import KeysProblem
from service.ledger.ledger import Ledger
from service.ledger.location import kept
from service.registry import (
    ModelRegistry,
    ServedAdapter,
    ServedModel,
    adapter_fingerprint,
    fingerprint,
)
from service.settings import Settings
from service.tracing.exporting import Tracing

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


def engine_patience(settings: Settings) -> Patience:
    return Patience(stalled_after=settings.watchdog_timeout, retry=settings.retry_timeout)


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
