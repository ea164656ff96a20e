"""Keys: deny by default on every route, whatever the Host or the spelling of the path."""

from __future__ import annotations

import re
import socket
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from fastapi import FastAPI
from starlette.routing import BaseRoute, Route

from service.api.authentication import PUBLIC_PATHS
from tests.api.conftest import talking_to
from tests.api.live import listening

KEYS = {"api_key": ["first-key", "second-key"]}


def routes_of(app: FastAPI) -> list[tuple[str, str]]:
    """All the app has, also what its page does not show, each with methods it does not take."""
    return [
        (method, route.path)
        for route in routes_below(app.routes)
        for method in sorted({*(route.methods or ()), "HEAD", "OPTIONS", "POST", "TRACE"})
    ]


def routes_below(found: Iterable[BaseRoute]) -> Iterator[Route]:
    """FastAPI keeps routers it included as they are."""
    for one in found:
        if isinstance(one, Route):
            yield one
        elif (router := getattr(one, "original_router", None)) is not None:
            yield from routes_below(router.routes)


def test_the_enumeration_sees_every_kind_of_route(make_app: Callable[..., FastAPI]) -> None:
    app = make_app()
    found = {path for _, path in routes_of(app)}
    shown = {path.replace("{model_id}", "{model_id:path}") for path in app.openapi()["paths"]}
    assert found >= shown | {"/docs", "/openapi.json"}


def spellings(path: str) -> list[str]:
    """The path as crafty clients may write it."""
    first = path.lstrip("/")
    encoded = "".join(f"%{ord(c):02x}" if c.isalpha() else c for c in path)
    return [
        path,
        f"//{first}",
        f"///{first}",
        f"/{first.replace('/', '//')}",
        f"/livez//..//{first}",
        f"/livez;/{first}",
        f"{path};livez",
        f"{path}%00",
        f"{path}%3fx=/livez",
        f"/.{path}",
        f"/livez/../{first}",
        f"/livez%2f..%2f{first}",
        encoded,
        f"{path}?x=/livez",
        f"{path}/",
        path.upper(),
    ]


@pytest.mark.parametrize("host", ["pronk", "evil/livez?", "x/livez#", "[::1]", ""])
async def test_every_route_but_the_public_ones_needs_a_key(
    make_app: Callable[..., FastAPI], host: str
) -> None:
    app = make_app(**KEYS)
    async with talking_to(app) as client:
        for method, path in routes_of(app):
            for spelling in spellings(re.sub(r"{\w+(:path)?}", "tiny", path)):
                response = await client.request(
                    method, f"http://pronk{spelling}", headers={"Host": host}
                )
                is_public = path in PUBLIC_PATHS and response.status_code != 401
                assert is_public or response.status_code == 401, (method, spelling)


TARGETS = (
    "http://127.0.0.1/v1/models",
    "http://127.0.0.1/livez/../v1/models",
    "http://livez/v1/models",
    "//livez/v1/models",
    "/livez/../v1/models",
    "/livez%2f../v1/models",
    "/livez\\..\\v1/models",
    "/v1/models#/livez",
    "/v1/models?/livez",
    "/v1/models/%2e%2e/%2e%2e/livez",
    "livez",
    "*",
)


def test_no_form_of_a_request_target_gets_past_the_keys(make_app: Callable[..., FastAPI]) -> None:
    """As they come over a socket, unchanged by a client's own notion of a URL."""
    with listening(make_app(**KEYS)) as url:
        assert ask_raw(url, "GET", "/livez") == 200
        for method in ("GET", "HEAD", "OPTIONS", "POST", "livez"):
            for target in TARGETS:
                assert ask_raw(url, method, target) in (400, 401), (method, target)


def ask_raw(url: str, method: str, target: str) -> int:
    address = urlsplit(url)
    with socket.create_connection((address.hostname, address.port), timeout=10) as connection:
        lines = f"{method} {target} HTTP/1.1", "Host: /livez", "Connection: close", "", ""
        connection.sendall("\r\n".join(lines).encode())
        return int(connection.makefile("rb").readline().split()[1])


@pytest.mark.parametrize("path", sorted(PUBLIC_PATHS))
async def test_public_paths_need_none(make_app: Callable[..., FastAPI], path: str) -> None:
    async with talking_to(make_app(**KEYS)) as client:
        assert (await client.get(path)).status_code == 200


async def test_the_refusal_is_the_envelope_with_its_challenge(
    make_app: Callable[..., FastAPI],
) -> None:
    async with talking_to(make_app(**KEYS)) as client:
        response = await client.get("/v1/models")
    assert response.headers["www-authenticate"] == "Bearer"
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
    assert response.headers["x-request-id"]


@pytest.mark.parametrize(
    ("header", "status"),
    [
        ("Bearer first-key", 200),
        ("bearer second-key", 200),
        ("Bearer third-key", 401),
        ("Bearer first-key2", 401),
        ("Bearer ", 401),
        ("Basic first-key", 401),
        ("first-key", 401),
        ("Bearer schlüssel", 401),
    ],
)
async def test_any_of_the_keys_opens(
    make_app: Callable[..., FastAPI], header: str, status: int
) -> None:
    async with talking_to(make_app(**KEYS)) as client:
        headers = {"Authorization": header.encode("utf-8")}
        assert (await client.get("/v1/models", headers=headers)).status_code == status


async def test_two_keys_in_one_request_open_nothing(make_app: Callable[..., FastAPI]) -> None:
    headers = [("Authorization", "Bearer first-key"), ("Authorization", "Bearer other")]
    async with talking_to(make_app(**KEYS)) as client:
        assert (await client.get("/v1/models", headers=headers)).status_code == 401


async def test_a_strangers_body_is_never_read(make_app: Callable[..., FastAPI]) -> None:
    read = False

    async def body() -> AsyncIterator[bytes]:
        nonlocal read
        read = True
        yield b"{}"

    async with talking_to(make_app(**KEYS)) as client:
        response = await client.post("/v1/completions", content=body())
    assert response.status_code == 401
    assert not read


async def test_a_root_path_opens_nothing_else(make_app: Callable[..., FastAPI]) -> None:
    async with talking_to(make_app(**KEYS), root_path="/livez") as client:
        assert (await client.get("/livez/v1/models")).status_code == 401
        assert (await client.get("/livez/livez")).status_code == 200
    async with talking_to(make_app(**KEYS), root_path="/llm") as client:
        assert (await client.get("/llm/livez")).status_code == 200
        assert (await client.get("/llm/v1/models")).status_code == 401
        assert (await client.get("/llm/livez/v1/models")).status_code == 401


async def test_metrics_are_public_only_by_choice(make_app: Callable[..., FastAPI]) -> None:
    for is_public, status in ((False, 401), (True, 200)):
        async with talking_to(make_app(metrics_public=is_public, **KEYS)) as client:
            assert (await client.get("/metrics")).status_code == status


# ---- browsers

PREFLIGHT = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}


async def test_no_origin_is_allowed_by_default(client: httpx.AsyncClient) -> None:
    response = await client.get("/livez", headers={"Origin": "https://a.example"})
    assert "access-control-allow-origin" not in response.headers
    assert (await client.options("/v1/completions", headers=PREFLIGHT)).status_code == 405


async def test_allowed_origins_may_ask_first_and_read_refusals(
    make_app: Callable[..., FastAPI],
) -> None:
    settings: dict[str, Any] = {"allowed_origins": ["https://a.example"], **KEYS}
    async with talking_to(make_app(**settings)) as client:
        response = await client.options("/v1/completions", headers=PREFLIGHT)
        assert response.status_code == 200
        assert response.headers["access-control-allow-origin"] == "https://a.example"
        refused = await client.get("/v1/models", headers={"Origin": "https://a.example"})
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://a.example"
        other = await client.get("/v1/models", headers={"Origin": "https://b.example"})
        assert "access-control-allow-origin" not in other.headers


async def test_a_missing_key_and_a_wrong_one_are_told_apart(
    make_app: Callable[..., FastAPI],
) -> None:
    async with talking_to(make_app(**KEYS)) as client:
        missing = (await client.get("/v1/models")).json()["error"]["message"]
        headers = {"Authorization": "Bearer third-key"}
        wrong = (await client.get("/v1/models", headers=headers)).json()["error"]["message"]
    assert "No API key" in missing
    assert "not one of" in wrong
    assert "third-key" not in wrong


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([("x-api-key", "first-key")], 200),
        ([("x-api-key", "first-key"), ("authorization", "Bearer first-key")], 200),
        ([("x-api-key", "wrong")], 401),
        ([("x-api-key", "second-key"), ("authorization", "Bearer first-key")], 401),
        ([("x-api-key", "")], 401),
        ([("x-api-key", "first-key"), ("x-api-key", "first-key")], 401),
        ([("x-api-key", "first-key"), ("authorization", "Bearer wrong")], 401),
        ([("x-api-key", "wrong"), ("authorization", "Bearer first-key")], 401),
    ],
)
async def test_a_bare_key_counts_as_a_bearer_does(
    make_app: Callable[..., FastAPI], headers: list[tuple[str, str]], status: int
) -> None:
    async with talking_to(make_app(**KEYS)) as client:
        response = await client.get("/v1/models", headers=headers)
    assert response.status_code == status
