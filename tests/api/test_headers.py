"""Headers that every answer has, and those of the one page for browsers."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from tests.api.conftest import talking_to
from tests.api.fakes import FakeEngine
from tests.api.test_auth import PREFLIGHT

HI = {"prompt": "Hi"}
JSON = {"Content-Type": "application/json"}
ORIGIN = {"Origin": "https://a.example"}


async def answers(client: httpx.AsyncClient, engine: FakeEngine) -> list[httpx.Response]:
    """One of each kind: good, streamed, refused by every layer, failed."""
    found = [
        await client.get("/livez"),
        await client.get("/metrics"),
        await client.get("/docs"),
        await client.get("/openapi.json"),
        await client.get("/v1/models"),
        await client.get("/nowhere"),
        await client.delete("/v1/models"),
        await client.options("/v1/completions", headers=PREFLIGHT),
        await client.post("/v1/completions", json=HI),
        await client.post("/v1/completions", json=HI | {"stream": True}),
        await client.post("/v1/completions", json={"prompt": ""}),
        await client.post("/v1/completions", content=b"{}", headers={"Content-Type": "text/x"}),
        await client.post("/v1/messages", json={}),
        await client.post("/v1/completions", content=b" " * 10_000, headers=JSON),
        await client.get("/v1/models", headers={"Authorization": "Bearer wrong"}),
    ]
    engine.fail_after = 0
    found.append(await client.post("/v1/completions", json=HI))
    assert found[-1].status_code == 500
    return found


@pytest.mark.parametrize("origins", [[], ["https://a.example"]])
async def test_every_answer_forbids_guessing_its_type_keeping_it_and_names_no_software(
    make_app: Callable[..., FastAPI], engine: FakeEngine, origins: list[str]
) -> None:
    settings: dict[str, Any] = {"allowed_origins": origins, "max_body_bytes": 4096}
    key = {"Authorization": "Bearer key"}
    async with talking_to(make_app(api_key=["key"], **settings)) as client:
        client.headers.update(key)
        found = await answers(client, engine)
    statuses = {response.status_code for response in found}
    assert statuses >= {200, 400, 401, 404, 413, 415, 500}
    for response in found:
        assert response.headers["x-content-type-options"] == "nosniff", response.request.url
        assert "no-store" in response.headers["cache-control"], response.request.url
        assert response.headers["x-request-id"]
        assert not {"server", "x-powered-by"} & set(response.headers)


async def test_the_page_runs_its_own_script_and_no_other_and_is_framed_by_nobody(
    client: httpx.AsyncClient,
) -> None:
    response = await client.get("/docs")
    headers = response.headers
    assert headers["content-type"].startswith("text/html")
    assert headers["x-frame-options"] == "DENY"
    assert headers["referrer-policy"] == "no-referrer"
    policy = dict(
        part.strip().partition(" ")[::2] for part in headers["content-security-policy"].split(";")
    )
    assert policy["default-src"] == "'none'"
    assert policy["frame-ancestors"] == "'none'"
    assert "unsafe" not in policy["script-src"]
    (script,) = re.findall(r"<script>(.*?)</script>", response.text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"'sha256-{digest}'" in policy["script-src"]
    for source in re.findall(r'src="([^"]+)"', response.text):
        assert source.startswith(policy["script-src"].split()[0])
    assert "/openapi.json" in script


async def test_behind_a_root_path_the_page_asks_for_the_right_description(
    make_app: Callable[..., FastAPI],
) -> None:
    async with talking_to(make_app(), root_path="/llm") as client:
        response = await client.get("/llm/docs")
    assert "'/llm/openapi.json'" in response.text


async def test_no_json_answer_says_more_to_browsers_than_it_must(
    client: httpx.AsyncClient,
) -> None:
    response = await client.post("/v1/completions", json=HI, headers=ORIGIN)
    assert not [name for name in response.headers if name.startswith("access-control-")]


@pytest.mark.parametrize("origin", ["null", "https://a.example.evil", "https://A.example", "*"])
async def test_an_origin_that_only_looks_allowed_is_not(
    make_app: Callable[..., FastAPI], origin: str
) -> None:
    async with talking_to(make_app(allowed_origins=["https://a.example"])) as client:
        asked = PREFLIGHT | {"Origin": origin}
        preflight = await client.options("/v1/completions", headers=asked)
        assert preflight.status_code == 400
        assert "access-control-allow-origin" not in preflight.headers
        assert preflight.json()["error"]["type"] == "invalid_request_error"
        answer = await client.post("/v1/completions", json=HI, headers={"Origin": origin})
        assert "access-control-allow-origin" not in answer.headers


async def test_an_allowed_origin_is_named_alone_and_gets_no_credentials(
    make_app: Callable[..., FastAPI],
) -> None:
    origins = ["https://a.example", "https://b.example"]
    async with talking_to(make_app(allowed_origins=origins)) as client:
        response = await client.post("/v1/completions", json=HI, headers=ORIGIN)
        assert response.headers["access-control-allow-origin"] == "https://a.example"
        assert "origin" in response.headers["vary"].lower()
        assert "access-control-allow-credentials" not in response.headers
