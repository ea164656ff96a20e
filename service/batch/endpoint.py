"""Where a batch's requests go: an app in this process with its own engine, or a server."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

import httpx

from service.backend import Backend, ServeProblem, find_model, usage_ledger
from service.batch.problem import BatchProblem
from service.ledger.location import LedgerProblem
from service.settings import Settings

DEFAULT_CONCURRENCY = 64  # of a server, whose engine's width is not known
WAITING = 2  # times what runs together is asked for at once: the engine never waits for this side


@dataclass(frozen=True)
class Endpoint:
    """``concurrency``: requests that fill it."""

    client: httpx.AsyncClient
    concurrency: int
    max_body_bytes: int


@contextlib.asynccontextmanager
async def own_engine(settings: Settings) -> AsyncIterator[Endpoint]:
    """An engine as ``pronk serve`` starts it, and the same app before it; no socket listens."""
    try:
        # Only where it was asked for: a batch has no keys to charge.
        with usage_ledger(settings, by_default=False) as ledger:
            backend = Backend(settings, find_model(settings.model), ledger)
            try:
                await backend.load()
                width = int(backend.engine.state.facts["max_num_seqs"])
                transport = httpx.ASGITransport(app=backend.app, raise_app_exceptions=False)
                async with httpx.AsyncClient(
                    transport=transport,
                    base_url="http://pronk",
                    headers=_authorization(backend.app.state.server.keyring.own_key),
                    timeout=None,  # the engine is watched, an answer takes what it takes
                ) as client:
                    yield Endpoint(client, WAITING * width, settings.max_body_bytes)
            finally:
                await backend.engine.stop()
    except (ServeProblem, LedgerProblem) as problem:
        raise BatchProblem(str(problem)) from None


@contextlib.asynccontextmanager
async def running_server(url: str, api_key: str, max_body_bytes: int) -> AsyncIterator[Endpoint]:
    base = url.rstrip("/").removesuffix("/v1")
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    try:
        client = httpx.AsyncClient(
            base_url=base,
            headers=_authorization(api_key),
            limits=limits,
            timeout=httpx.Timeout(10.0, read=None),
        )
    except httpx.InvalidURL as error:
        raise BatchProblem(f"--url: {error}") from None
    if client.base_url.scheme not in ("http", "https"):
        raise BatchProblem("--url: begins with http:// or https://")
    async with client:
        yield Endpoint(client, DEFAULT_CONCURRENCY, max_body_bytes)


def _authorization(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}
