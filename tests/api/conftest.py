"""An app over a fake engine, and a client that talks to it in this process."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from service.api.app import create_app
from service.registry import ModelRegistry
from service.settings import Settings
from tests.api.fakes import FakeEngine, served


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def make_app(engine: FakeEngine) -> Callable[..., FastAPI]:
    def make(**settings: Any) -> FastAPI:
        return create_app(Settings(**settings), ModelRegistry([served(engine)]))

    return make


@asynccontextmanager
async def talking_to(app: FastAPI, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://pronk", **options) as client:
        yield client


@pytest.fixture
async def client(make_app: Callable[..., FastAPI]) -> AsyncIterator[httpx.AsyncClient]:
    async with talking_to(make_app()) as client:
        yield client


def chunks_of(body: str) -> list[dict[str, Any]]:
    """The JSON of every event; asserts the framing and that [DONE] ends it, once."""
    frames = [frame for frame in body.split("\n\n") if frame and not frame.startswith(":")]
    assert all(frame.startswith("data: ") for frame in frames)
    assert frames[-1] == "data: [DONE]"
    assert frames.count("data: [DONE]") == 1
    return [json.loads(frame.removeprefix("data: ")) for frame in frames[:-1]]
