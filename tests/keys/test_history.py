"""Quotas go on after a restart where there is a usage ledger, with or without trouble."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from service.api.app import create_app
from service.keys.history import history_of
from service.keys.key import hash_of
from service.ledger.ledger import Ledger
from service.ledger.store import Store
from service.registry import ModelRegistry
from service.settings import Settings
from tests.api.conftest import talking_to
from tests.api.fakes import FakeEngine, served

DAY, MONTH = 10_000, 50_000
ENTRY = f"""
[keys.alice]
sha256 = "{hash_of("alice-key")}"
tokens_per_day = {DAY}
tokens_per_month = {MONTH}
"""


@asynccontextmanager
async def started(folder: Path) -> AsyncIterator[httpx.AsyncClient]:
    """A server over the folder's keys file and ledger."""
    ledger = Ledger(Store(folder / "usage.db"), interval=0.01)
    try:
        settings = Settings(api_keys_file=folder / "keys.toml")
        app = create_app(settings, ModelRegistry([served(FakeEngine())]), ledger)
        async with talking_to(app) as client:
            client.headers["x-api-key"] = "alice-key"
            yield client
    finally:
        ledger.close()


async def spend(client: httpx.AsyncClient) -> tuple[int, int, int]:
    """Tokens of one answer, and what is left of the day and the month after it."""
    answer = await client.post("/v1/completions", json={"prompt": "Hi"})
    left = [
        int(answer.headers[f"x-ratelimit-remaining-tokens-{unit}"]) for unit in ("day", "month")
    ]
    return answer.json()["usage"]["total_tokens"], left[0], left[1]


async def test_a_restarted_server_counts_on_from_what_the_ledger_says(tmp_path: Path) -> None:
    write(tmp_path / "keys.toml", ENTRY)
    total = 0
    for _ in range(3):
        async with started(tmp_path) as client:
            for _ in range(2):
                used, day, month = await spend(client)
                total += used
                assert (day, month) == (DAY - total, MONTH - total)


async def test_a_key_that_gets_a_quota_starts_with_what_it_spent_before(tmp_path: Path) -> None:
    write(tmp_path / "keys.toml", "\n".join(ENTRY.splitlines()[:3]))
    async with started(tmp_path) as client:
        answer = await client.post("/v1/completions", json={"prompt": "Hi"})
        total = answer.json()["usage"]["total_tokens"]
        write(tmp_path / "keys.toml", ENTRY)
        app = client._transport.app  # type: ignore[attr-defined]
        await app.state.server.keyring.reload()
        used, day, _ = await spend(client)
        assert day == DAY - total - used


def test_a_ledger_that_cannot_be_read_is_told_of_and_refuses_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ledger = Ledger(Store(tmp_path / "usage.db"), interval=0.01)
    ledger.close()
    for path in tmp_path.iterdir():
        path.write_bytes(b"no database at all" * 1000)
    with caplog.at_level(logging.ERROR, "pronk.keys"):
        assert history_of(ledger)("x", 0.0) == 0
    assert "cannot be read" in caplog.text
    assert history_of(None)("x", 0.0) == 0


def write(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o600)
