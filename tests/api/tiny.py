"""An app over a real engine process that serves a tiny float32 network, and the network itself."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
from fastapi import FastAPI
from transformers import LlamaForCausalLM

from model.chat_template import load_chat_template
from service.api.app import create_app
from service.engine.client import EngineClient
from service.engine.options import EngineOptions
from service.engine.process import WORKER
from service.engine.supervisor import Patience
from service.ledger.ledger import Ledger
from service.registry import ModelRegistry, ServedAdapter, ServedModel
from service.settings import Settings
from tests.api.conftest import talking_to
from tests.api.fakes import EOS, VOCABULARY, ByteTokenizer
from tests.engine.checkpoints import write_tiny_llama

CONTEXT = 512
LIMITS = {"block_size": 32, "max_num_batched_tokens": 48, "threads": 1, "log_level": "error"}


@contextmanager
def tiny_checkpoint() -> Iterator[tuple[Path, LlamaForCausalLM]]:
    """A folder with a short name: a Unix socket's path has 108 bytes."""
    folder = Path(tempfile.mkdtemp(prefix="tiny-"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield folder / "model", write_tiny_llama(folder / "model", vocabulary=VOCABULARY)
    finally:
        torch.set_num_threads(threads)
        shutil.rmtree(folder)


@dataclass
class Tiny:
    """A client of the app, the engine behind it, and the same network as transformers has it."""

    http: httpx.AsyncClient
    engine: EngineClient
    network: LlamaForCausalLM
    app: FastAPI

    async def ask(self, path: str, **fields: Any) -> dict[str, Any]:
        response = await self.http.post(path, json=fields)
        assert response.status_code == 200, response.text
        return dict(response.json())

    @torch.no_grad()
    def logprobs(self, ids: list[int]) -> torch.Tensor:
        """[T, V] float64: of the token after each position."""
        logits = self.network(torch.tensor([ids])).logits[0]
        return torch.log_softmax(logits.double(), dim=-1)

    @torch.no_grad()
    def states(self, ids: list[int]) -> torch.Tensor:
        """[T, hidden] after the final norm."""
        return self.network.model(torch.tensor([ids])).last_hidden_state[0].double()


@asynccontextmanager
async def tiny_server(
    path: Path,
    network: LlamaForCausalLM,
    settings: dict[str, Any] | None = None,
    ledger: Ledger | None = None,
    patience: Patience | None = None,
    worker: str = WORKER,
    **limits: Any,
) -> AsyncIterator[Tiny]:
    options = EngineOptions(model=str(path), socket="", **{**LIMITS, **limits})
    engine = EngineClient(options, patience=patience, worker=worker)
    await engine.start()
    try:
        await engine.wait_ready()
        tokenizer = ByteTokenizer()
        model = ServedModel(
            ["tiny"],
            [engine],
            CONTEXT,
            tokenizer,
            chat_template=load_chat_template(tokenizer),
            eos_token_ids=(EOS,),
        )
        for name, folder in limits.get("adapters", {}).items():
            model.adapters[name] = ServedAdapter(name, Path(folder))
        app = create_app(Settings(**settings or {}), ModelRegistry([model]), ledger)
        async with talking_to(app) as client:
            yield Tiny(client, engine, network, app)
    finally:
        await engine.stop()
