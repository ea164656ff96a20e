"""The models this server serves: each name maps to a list of engines, from the first day one long.

A served model exists before it is loaded (no tokenizer, engines starting): requests for it are then
refused with 503 and the reason, never with 404.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from service import __version__
from service.engine.messages import Output, Outputs, SamplingSettings, State, Submit
from service.engine.refusals import unavailable
from service.engine.tally import Tally
from service.errors import ModelNotAllowed, ModelNotFound, Unavailable

if TYPE_CHECKING:
    from model.chat_template import ChatTemplate
    from model.tokenizer import Tokenizer

Allowed = frozenset[str] | None  # names a caller may use; None: all

MOST_NAMED = 20  # models a refusal lists
DRAIN_RETRY = 5.0  # seconds: another replica should answer; this one will be gone


class Generation(Protocol):
    """The outputs of one prompt's choices, as they come."""

    def __aiter__(self) -> AsyncIterator[Output]: ...
    def stop(self, choice: int) -> None:
        """Drop one choice: a stop string was found in its text."""


class Engine(Protocol):
    """What the API needs of an engine; ``service.engine.client.EngineClient`` is the real one."""

    observers: list[Callable[[Outputs | State], None]]

    @property
    def restarts(self) -> Mapping[str, int]:
        """Engines started anew, by why the one before had ended."""

    @property
    def num_retried(self) -> int:
        """Requests that a second engine was asked for, because the first died over them."""

    @property
    def num_poisonous(self) -> int:
        """Refusals of requests that ended the engine twice."""

    @property
    def num_discarded(self) -> int:
        """Tokens that reached this process and nobody read."""

    @property
    def state(self) -> State: ...
    @property
    def is_ready(self) -> bool: ...
    def retry_after(self) -> float:
        """Seconds after which a refused client may find the engine ready."""

    def submit(
        self,
        prompt: list[int],
        settings: list[SamplingSettings],
        *,
        namespace: bytes = b"",
        account: str = "",
        weight: float = 1.0,
        priority: int = 0,
        deadline: float | None = None,
        max_queue: float | None = None,
        prompt_logprobs: int | None = None,
        request_id: str = "",
        adapter: str = "",
        adapter_version: int = 0,
        grammar: str = "",
        pooling: str = "",
        logprobs_from: int = 1,
        is_continuation: bool = False,
        is_retry: bool = False,
        tally: Tally | None = None,
    ) -> AbstractAsyncContextManager[Generation]:
        """Entering it raises ``service.errors``; leaving it is the only way to cancel.

        ``is_continuation`` of a request that was taken before: a draining engine takes it, too, and
        where there is none it waits for one. So does ``is_retry``, of what an engine died over.
        ``tally`` is told of everything that comes of it, also of what nobody reads.
        """

    def estimate(self, submits: list[Submit]) -> Coroutine[None, None, dict[str, object]]:
        """What they would take if they came now. Raises the refusal they would get."""

    def load_adapter(self, name: str, folder: str) -> Coroutine[None, None, None]:
        """In place of one of that name; ``state.adapters`` has it then. Raises a PronkError."""

    def unload_adapter(self, name: str) -> Coroutine[None, None, None]:
        """Requests that use it go on. Raises a PronkError."""


@dataclass(frozen=True)
class ServedAdapter:
    """A low-rank adapter: a model of its own to clients, a few more numbers to the engine."""

    name: str
    folder: Path
    fingerprint: str = ""
    created: int = field(default_factory=lambda: int(time.time()))

    def version(self, engine: Engine) -> int:
        """Which loading of it new requests use. Raises ``ModelNotFound`` where there is none."""
        version = engine.state.adapters.get(self.name, 0)
        if not version:
            raise ModelNotFound(f"The adapter {self.name!r} is not loaded.")
        return version


@dataclass
class ServedModel:
    """One model under its names. What loading finds out is filled in when it is known."""

    names: list[str]
    engines: Sequence[Engine]
    max_model_len: int  # tokens of prompt and answer; an engine with less memory may say less
    tokenizer: Tokenizer | None = None
    chat_template: ChatTemplate | None = None
    vocab_size: int | None = None  # rows of the logits; None: the tokenizer's
    hidden_size: int | None = None  # components of an embedding
    eos_token_ids: tuple[int, ...] = ()
    generation_defaults: Mapping[str, float] = field(default_factory=dict)
    fingerprint: str = ""
    created: int = field(default_factory=lambda: int(time.time()))
    adapters: dict[str, ServedAdapter] = field(default_factory=dict)  # by name

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def is_ready(self) -> bool:
        return self.tokenizer is not None and any(engine.is_ready for engine in self.engines)

    @property
    def context(self) -> int:
        """Tokens that prompt and answer may have together."""
        told = [engine.state.max_model_len for engine in self.engines]
        return min([self.max_model_len, *(length for length in told if length > 0)])

    @property
    def vocabulary(self) -> int:
        assert self.tokenizer is not None
        return self.vocab_size or self.tokenizer.vocab_size

    def pick(self) -> Engine:
        """The ready engine with the least to do. Raises ``Unavailable`` when there is none."""
        ready = [engine for engine in self.engines if engine.is_ready]
        if self.tokenizer is None or not ready:
            raise self.unavailable()
        return min(ready, key=lambda engine: engine.state.running + engine.state.waiting)

    def unavailable(self) -> Unavailable:
        """Why no engine can take work now, as clients are told."""
        stage = self.engines[0].state.stage
        if self.tokenizer is None and stage == "ready":
            stage = "loading"
        return unavailable(stage, self.engines[0].retry_after())


def draining() -> Unavailable:
    return Unavailable(
        "This server is shutting down and takes no new work; try another replica.",
        code="draining",
        retry_after=DRAIN_RETRY,
    )


class ModelRegistry:
    """Names to models. The first model answers requests that name none."""

    def __init__(self, models: Sequence[ServedModel]) -> None:
        assert models, "a server without a model serves nothing"
        self.models = list(models)
        self._by_name = {name: model for model in self.models for name in model.names}

    @property
    def is_ready(self) -> bool:
        return all(model.is_ready for model in self.models)

    def get(self, name: str | None, allowed: Allowed) -> ServedModel:
        """Also by an adapter's name. Raises as ``find`` does."""
        return self.find(name, allowed)[0]

    def find(self, name: str | None, allowed: Allowed) -> tuple[ServedModel, ServedAdapter | None]:
        """The model of that name, or an adapter and the model under it; ``None``: the first model.

        ``allowed`` is what the caller may use. Raises ``ModelNotAllowed`` or ``ModelNotFound``.
        """
        if allowed is not None:
            self._check_allowed(name, allowed)
        if name is None:
            return self.models[0], None
        if (model := self._by_name.get(name)) is not None:
            return model, None
        for model in self.models:
            if (adapter := model.adapters.get(name)) is not None:
                return model, adapter
        known = sorted([*self._by_name, *(name for m in self.models for name in m.adapters)])
        if allowed is not None:  # such a key learns of no other
            known = [one for one in known if one in allowed]
        listed = ", ".join(known[:MOST_NAMED]) + (", ..." if len(known) > MOST_NAMED else "")
        raise ModelNotFound(
            f"The model {name[:200]!r} does not exist here; served: {listed or 'nothing'}"
        )

    def _check_allowed(self, name: str | None, allowed: frozenset[str]) -> None:
        meant = self.models[0].names if name is None else [name]
        if allowed.isdisjoint(meant):
            said = (
                "the model that requests get which name none" if name is None else f"{name[:200]!r}"
            )
            listed = ", ".join(sorted(allowed)[:MOST_NAMED])
            more = ", ..." if len(allowed) > MOST_NAMED else ""
            raise ModelNotAllowed(f"This API key may not use {said}; it may use: {listed}{more}")

    def names(self) -> list[tuple[str, ServedModel]]:
        return [(name, model) for model in self.models for name in model.names]

    def adapters(self) -> list[tuple[ServedAdapter, ServedModel]]:
        return [(one, model) for model in self.models for one in model.adapters.values()]


def fingerprint(path: Path, config: bytes = b"") -> str:
    """What ``system_fingerprint`` says: weights' identity, configuration and pronk's version.

    Weights are known by name, size and their first 64 KiB (a safetensors or GGUF header names every
    tensor), so that replicas agree and a start need not read gigabytes.
    """
    digest = hashlib.sha256(__version__.encode() + b"\0" + config)
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    for file in files:
        if file.suffix in {".safetensors", ".gguf", ".pth", ".bin", ".json"} and file.is_file():
            digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
            with file.open("rb") as stream:
                digest.update(stream.read(1 << 16))
    return "fp_" + digest.hexdigest()[:16]


def adapter_fingerprint(model: ServedModel, folder: Path) -> str:
    """Of the model and what is added to it; an unreadable folder is the engine's to refuse."""
    try:
        return fingerprint(folder, model.fingerprint.encode())
    except OSError:
        return model.fingerprint
