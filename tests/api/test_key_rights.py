"""What a key of the keys file may do: routes by right, models by name, until it ends."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from service.keys.key import hash_of
from service.registry import ServedAdapter
from tests.api.conftest import talking_to
from tests.api.fakes import FakeEngine
from tests.api.test_auth import routes_of

FILE = "\n".join(
    f'[keys.{name}]\nsha256 = "{hash_of(f"{name}-key")}"\n{more}'
    for name, more in {
        "user": "weight = 2.5",
        "admin": "admin = true",
        "lora": 'models = ["lora"]',
        "both": 'models = ["tiny", "lora"]',
        "old": "expires = 2020-01-01T00:00:00Z",
        "gone": "disabled = true",
    }.items()
)
ADMIN_ROUTES = {"/metrics", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"}
CHAT = [{"role": "user", "content": "Hi"}]
ASKED = {  # every route that takes a model's name
    "/v1/completions": {"prompt": "Hi"},
    "/v1/chat/completions": {"messages": CHAT},
    "/v1/responses": {"input": "Hi"},
    "/v1/responses/input_tokens": {"input": "Hi"},
    "/v1/messages": {"messages": CHAT, "max_tokens": 5},
    "/v1/messages/count_tokens": {"messages": CHAT},
    "/v1/embeddings": {"input": "Hi"},
    "/v1/score": {"text_1": "Hi", "text_2": "Ho"},
    "/score": {"text_1": "Hi", "text_2": "Ho"},
    "/v1/rerank": {"query": "Hi", "documents": ["Ho"]},
    "/v2/rerank": {"query": "Hi", "documents": ["Ho"]},
    "/rerank": {"query": "Hi", "documents": ["Ho"]},
    "/v1/estimate": {"prompt": "Hi"},
    "/tokenize": {"prompt": "Hi"},
    "/detokenize": {"tokens": [65]},
}


def bearer(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {name}-key"}


def write(file: Path, text: str) -> None:
    file.write_text(text)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "keys.toml"
    path.write_text(FILE)
    path.chmod(0o600)
    return path


@pytest.fixture
def app(
    make_app: Callable[..., FastAPI], engine: FakeEngine, file: Path, tmp_path: Path
) -> FastAPI:
    app = make_app(api_keys_file=file, lora_root=tmp_path)
    model = app.state.server.models.models[0]
    model.hidden_size = 4
    model.adapters["lora"] = ServedAdapter("lora", tmp_path / "lora")
    engine.state.adapters["lora"] = 1
    return app


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    async with talking_to(app) as client:
        yield client


def rejections(app: FastAPI) -> dict[tuple[str, str], float]:
    text = app.state.server.metrics.text().decode()
    found = re.findall(r'pronk:key_rejections_total\{key="(.*)",reason="(.*)"\} (\S+)', text)
    return {(key, reason): float(value) for key, reason, value in found}


# ---- routes


async def test_admin_routes_take_admin_keys_alone(app: FastAPI, client: httpx.AsyncClient) -> None:
    refused = set()
    for method, path in routes_of(app):
        asked = re.sub(r"{\w+(:path)?}", "tiny", path)
        user = await client.request(method, asked, headers=bearer("user"))
        if user.status_code == 403:
            refused.add(path)
            error = user.json()["error"]
            assert (error["type"], error["code"]) == ("permission_error", "admin_required")
        admin = await client.request(method, asked, headers=bearer("admin"))
        assert admin.status_code not in (401, 403), path
    assert refused == ADMIN_ROUTES
    assert rejections(app) == {("user", "admin"): 3}


async def test_an_admin_route_refuses_before_it_reads_the_body(client: httpx.AsyncClient) -> None:
    read = False

    async def body() -> AsyncIterator[bytes]:
        nonlocal read
        read = True
        yield b"{}"

    path = "/v1/load_lora_adapter"
    assert (await client.post(path, content=body(), headers=bearer("user"))).status_code == 403
    assert not read


async def test_the_flags_key_has_every_right(make_app: Callable[..., FastAPI], file: Path) -> None:
    async with talking_to(make_app(api_key=["flag-key"], api_keys_file=file)) as client:
        assert (await client.get("/metrics", headers=bearer("flag"))).status_code == 200
        assert (await client.get("/metrics", headers=bearer("user"))).status_code == 403
        assert (await client.get("/metrics")).status_code == 401


async def test_public_metrics_need_no_right(make_app: Callable[..., FastAPI], file: Path) -> None:
    async with talking_to(make_app(metrics_public=True, api_keys_file=file)) as client:
        assert (await client.get("/metrics")).status_code == 200
        assert (await client.get("/metrics", headers=bearer("user"))).status_code == 200


async def test_a_file_without_keys_lets_nobody_in(
    make_app: Callable[..., FastAPI], tmp_path: Path
) -> None:
    (tmp_path / "none.toml").touch(0o600)
    async with talking_to(make_app(api_keys_file=tmp_path / "none.toml")) as client:
        assert (await client.get("/v1/models")).status_code == 401
        assert (await client.get("/livez")).status_code == 200


async def test_a_key_that_ended_opens_nothing_and_says_why(
    app: FastAPI, client: httpx.AsyncClient
) -> None:
    for name, said in (("old", "expired"), ("gone", "revoked"), ("none", "not one of")):
        refused = await client.get("/v1/models", headers=bearer(name))
        assert refused.status_code == 401
        assert said in refused.json()["error"]["message"]
    await client.get("/v1/models")
    ended = {("old", "expired"): 1, ("gone", "disabled"): 1, ("", "wrong"): 1, ("", "missing"): 1}
    assert rejections(app) == ended


async def test_a_key_expires_at_its_moment(make_app: Callable[..., FastAPI], file: Path) -> None:
    write(file, FILE.replace("2020-01-01T00:00:00Z", "2030-01-31T00:00:00Z"))
    app = make_app(api_keys_file=file)
    async with talking_to(app) as client:
        for now, status in ((1_896_047_999.0, 200), (1_896_048_000.0, 401)):
            app.state.server.keyring.clock = lambda now=now: now
            assert (await client.get("/v1/models", headers=bearer("old"))).status_code == status


async def test_a_revoked_key_is_out_once_the_file_is_read_again(
    app: FastAPI, client: httpx.AsyncClient, file: Path
) -> None:
    assert (await client.get("/v1/models", headers=bearer("user"))).status_code == 200
    write(file, FILE.replace("weight = 2.5", "disabled = true"))
    await app.state.server.keyring.reload()
    assert (await client.get("/v1/models", headers=bearer("user"))).status_code == 401


async def test_metrics_tell_how_the_file_is(app: FastAPI, file: Path) -> None:
    assert "pronk:keys_file_ok 1.0" in app.state.server.metrics.text().decode()
    assert "pronk:keys 5.0" in app.state.server.metrics.text().decode()  # the server's own, too
    write(file, "[keys.")
    await app.state.server.keyring.reload()
    text = app.state.server.metrics.text().decode()
    assert "pronk:keys_file_ok 0.0" in text
    assert "pronk:keys 5.0" in text


async def test_the_engine_is_told_id_and_weight(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    body = {"prompt": "Hi"}
    assert (await client.post("/v1/completions", json=body, headers=bearer("user"))).is_success
    [submit] = engine.submitted
    assert (submit["account"], submit["weight"]) == (hash_of("user-key")[:16], 2.5)


# ---- models


def test_no_route_that_takes_a_model_is_forgotten(app: FastAPI) -> None:
    posts = {path for path, item in app.openapi()["paths"].items() if "post" in item}
    assert posts - ADMIN_ROUTES == set(ASKED)


@pytest.mark.parametrize("path", sorted(ASKED))
async def test_other_models_than_the_keys_are_refused_on_every_route(
    app: FastAPI, client: httpx.AsyncClient, engine: FakeEngine, path: str
) -> None:
    for model in ("tiny", "nowhere", None):
        body: dict[str, Any] = ASKED[path] | ({} if model is None else {"model": model})
        refused = await client.post(path, json=body, headers=bearer("lora"))
        assert refused.status_code == 403, (model, refused.text)
        assert refused.json()["error"]["type"] == "permission_error"
        assert "it may use: lora" in refused.json()["error"]["message"]
        assert "tiny" not in refused.json()["error"]["message"] or model == "tiny"
    assert engine.submitted == []
    assert rejections(app) == {("lora", "model"): 3}
    for name, body in (("lora", {"model": "lora"}), ("both", {}), ("user", {"model": "lora"})):
        answered = await client.post(path, json=ASKED[path] | body, headers=bearer(name))
        assert answered.status_code != 403, answered.text


async def test_a_name_that_is_not_served_tells_a_bound_key_of_no_other(
    make_app: Callable[..., FastAPI], file: Path
) -> None:
    entry = f'[keys.bound]\nsha256 = "{hash_of("bound-key")}"\nmodels = ["nowhere", "tiny"]\n'
    write(file, FILE + "\n" + entry)
    async with talking_to(make_app(api_keys_file=file)) as client:
        for name, served in (("bound", "tiny"), ("user", "org/alias, tiny")):
            body = {"prompt": "Hi", "model": "nowhere"}
            refused = await client.post("/v1/completions", json=body, headers=bearer(name))
            assert refused.status_code == 404
            assert refused.json()["error"]["message"].endswith(f"served: {served}")


async def test_the_list_shows_what_the_key_may_use(client: httpx.AsyncClient) -> None:
    for name, models in (
        ("lora", ["lora"]),
        ("both", ["tiny", "lora"]),
        ("user", ["tiny", "org/alias", "lora"]),
    ):
        listed = (await client.get("/v1/models", headers=bearer(name))).json()["data"]
        assert [card["id"] for card in listed] == models
    for model, status in (("lora", 200), ("tiny", 403), ("nowhere", 403)):
        found = await client.get(f"/v1/models/{model}", headers=bearer("lora"))
        assert found.status_code == status
