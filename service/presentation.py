"""What ``pronk serve`` shows a person: loading progress, the banner, a sample completion."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
from fastapi import FastAPI
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from service import __version__
from service.engine.client import EngineClient
from service.engine.cores import CorePlan
from service.engine.messages import State
from service.http import listener
from service.registry import ServedModel
from service.settings import Settings

logger = logging.getLogger("pronk")

SAMPLE_PROMPT = "Once upon a time"
SAMPLE_TOKENS = 60


@contextmanager
def loading(engine: EngineClient) -> Iterator[None]:
    """A progress bar in a terminal, one line a stage elsewhere, until the block is left."""
    if not sys.stderr.isatty():
        observe = _StageLines()
        engine.observers.append(observe)
        try:
            yield
        finally:
            engine.observers.remove(observe)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("starting", total=1.0)

        def show(message: object) -> None:
            if isinstance(message, State):
                text = message.stage.replace("_", " ")
                progress.update(task, description=text, completed=message.progress)

        engine.observers.append(show)
        try:
            yield
        finally:
            engine.observers.remove(show)


class _StageLines:
    """Logs each change of stage once."""

    def __init__(self) -> None:
        self.stage = ""

    def __call__(self, message: object) -> None:
        if isinstance(message, State) and message.stage != self.stage:
            self.stage = message.stage
            if message.stage not in ("ready", "failed"):
                logger.info("%s", message.stage.replace("_", " "))


def banner(
    settings: Settings,
    model: ServedModel,
    state: State,
    plan: CorePlan,
    socket: listener.Socket,
) -> None:
    """Model, device, dtype, cache and address: what an operator asks first."""
    facts = state.facts
    names, size = ", ".join(model.names), _in_short(int(facts["parameters"]))
    logger.info(
        "pronk %s serves %s (%s, %s parameters)", __version__, names, facts["architecture"], size
    )
    logger.info(
        "on %s in %s with %s threads (%s); decodes by %s; torch %s",
        facts["device"],
        facts["dtype"],
        facts["threads"],
        plan.why,
        facts["attention"],
        facts["torch"],
    )
    if facts.get("quantization", "none") != "none":
        logger.info("%s", facts["quantization"])
    logger.info(
        "context %s tokens; KV cache %s tokens in %s; at most %s sequences and %s tokens a step",
        f"{model.context:,}",
        f"{int(facts['kv_tokens']):,}",
        facts["kv_cache_dtype"],
        facts["max_num_seqs"],
        facts["max_num_batched_tokens"],
    )
    if settings.num_speculative_tokens and (
        settings.speculative_method != "none" or settings.speculative_model is not None
    ):
        logger.info(
            "guesses at most %d tokens ahead: %s by default; draft model: %s",
            settings.num_speculative_tokens,
            settings.speculative_method,
            facts.get("draft", "none"),
        )
    if int(facts.get("host_tokens", 0)):
        logger.info("host memory keeps %s tokens more", f"{int(facts['host_tokens']):,}")
    if settings.log_content:
        logger.warning("--log-content is on: prompts and answers are written to the log")
    has_keys = settings.api_key or settings.api_keys_file
    if not has_keys and settings.host not in ("127.0.0.1", "::1", "localhost"):
        logger.warning("no API keys: whoever reaches this address may use the model")
    logger.info("ready on %s", listener.address(settings, socket))


def _in_short(count: int) -> str:
    """4737792 -> 4.7M."""
    for power, unit in ((9, "B"), (6, "M"), (3, "K")):
        if count >= 10**power:
            return f"{count / 10**power:.1f}{unit}"
    return str(count)


async def sample(app: FastAPI) -> None:
    """One completion through the whole service, printed: proof that it answers."""
    headers = {"Authorization": f"Bearer {app.state.server.keyring.own_key}"}
    body = {"prompt": SAMPLE_PROMPT, "max_tokens": SAMPLE_TOKENS, "seed": 1}
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://pronk") as client:
        answer = await client.post("/v1/completions", json=body, headers=headers, timeout=None)
    if answer.status_code != 200:
        logger.warning("the sample completion failed: %s", answer.json()["error"]["message"])
        return
    text = answer.json()["choices"][0]["text"]
    Console(highlight=False).print(
        f"\n[bold]{SAMPLE_PROMPT}[/bold]", end="", markup=True, soft_wrap=True
    )
    Console(highlight=False).print(text + "\n", markup=False, soft_wrap=True)
    sys.stdout.flush()
