"""Adapters as models: listed, selected by name, loaded and unloaded by those who may."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from msgspec.structs import replace

from service.api.app import create_app
from service.errors import InvalidRequest, Unavailable
from service.registry import ModelRegistry, ServedAdapter, ServedModel
from service.settings import Settings, SettingsProblem, read_settings
from tests.api.conftest import talking_to
from tests.api.fakes import FakeEngine, served

KEY = {"Authorization": "Bearer secret"}
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("root/sql", "root/deep/poet", "outside"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "adapter_config.json").write_text("{}")
    return tmp_path / "root"


@pytest.fixture
def model(engine: FakeEngine) -> ServedModel:
    return served(engine)


@pytest.fixture
def app(model: ServedModel, root: Path) -> FastAPI:
    settings = Settings(lora_root=root, api_key=["secret"])  # type: ignore[arg-type, list-item]
    return create_app(settings, ModelRegistry([model]))


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    async with talking_to(app) as client:
        client.headers.update(KEY)
        yield client


async def load(client: httpx.AsyncClient, name: str, path: str, **more: Any) -> httpx.Response:
    return await client.post(LOAD, json={"lora_name": name, "lora_path": path, **more})


async def unload(client: httpx.AsyncClient, name: str) -> httpx.Response:
    return await client.post(UNLOAD, json={"lora_name": name})


async def complete(client: httpx.AsyncClient, model: str, **more: Any) -> httpx.Response:
    body = {"model": model, "prompt": "Hi", "max_tokens": 3, **more}
    return await client.post("/v1/completions", json=body)


def error_of(response: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


async def test_a_loaded_adapter_is_a_model(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    answer = await load(client, "team/sql", "sql")
    assert (answer.status_code, answer.text) == (
        200,
        "Success: LoRA adapter 'team/sql' added successfully.",
    )
    cards = (await client.get("/v1/models")).json()["data"]
    assert [card["id"] for card in cards] == ["tiny", "org/alias", "team/sql"]
    card = (await client.get("/v1/models/team/sql")).json()
    assert card == cards[-1]
    assert (card["parent"], card["root"], card["max_model_len"]) == ("tiny", "sql", 200)
    assert cards[0]["parent"] is None
    for path in ("/v1/completions", "/v1/chat/completions"):
        body: dict[str, Any] = {"model": "team/sql", "max_tokens": 3, "prompt": "Hi"}
        if "chat" in path:
            body = {"model": "team/sql", "messages": [{"role": "user", "content": "Hi"}]}
        answer = await client.post(path, json=body)
        assert answer.status_code == 200
        assert answer.json()["model"] == "team/sql"
        assert answer.json()["system_fingerprint"] != "fp_test"
        sent = engine.submitted[-1]
        assert (sent["adapter"], sent["adapter_version"]) == ("team/sql", 1)
    assert (await complete(client, "tiny")).json()["system_fingerprint"] == "fp_test"
    assert (engine.submitted[-1]["adapter"], engine.submitted[-1]["adapter_version"]) == ("", 0)
    tokens = await client.post("/tokenize", json={"model": "team/sql", "prompt": "Hi"})
    assert tokens.json()["tokens"] == [256, 72, 105]


async def test_an_unloaded_one_is_not_found(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    await load(client, "sql", "sql")
    answer = await unload(client, "sql")
    assert answer.text == "Success: LoRA adapter 'sql' removed successfully."
    for gone in (
        await complete(client, "sql"),
        await client.get("/v1/models/sql"),
        await unload(client, "sql"),
        await unload(client, "tiny"),
    ):
        assert gone.status_code == 404
        assert error_of(gone)["code"] == "model_not_found"
    assert engine.loaded == {}
    assert (await load(client, "sql", "deep/poet")).status_code == 200


async def test_a_name_is_taken_once_unless_it_is_to_be_replaced(
    client: httpx.AsyncClient, engine: FakeEngine, root: Path
) -> None:
    await load(client, "sql", "sql")
    for name in ("sql", "tiny", "org/alias"):
        refused = await load(client, name, "deep/poet")
        assert refused.status_code == 400
        assert error_of(refused)["param"] == "lora_name"
    assert (await load(client, "tiny", "sql", load_inplace=True)).status_code == 400
    assert (await load(client, "sql", "deep/poet", load_inplace=True)).status_code == 200
    assert engine.loaded == {"sql": str(root / "deep" / "poet")}
    await complete(client, "sql")
    assert engine.submitted[-1]["adapter_version"] == 2


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("../outside", 403),
        ("deep/../../outside", 403),
        ("/etc", 403),
        ("/no/such/folder", 403),
        ("..", 403),
        ("link", 403),
        ("linked-file", 403),
        ("missing", 404),
        ("sql/adapter_config.json", 404),
        ("s\0ql", 400),
        ("x" * 300, 400),
        ("x/" * 2_100, 400),
        ("ring", 400),
        ("", 400),
        (7, 400),
    ],
)
async def test_only_folders_below_the_root_are_read(
    client: httpx.AsyncClient, engine: FakeEngine, root: Path, path: Any, status: int
) -> None:
    (root / "link").symlink_to(root.parent / "outside")
    (root / "ring").symlink_to(root / "ring")
    (root / "linked-file").mkdir()
    (root / "linked-file" / "adapter_model.safetensors").symlink_to("/etc/passwd")
    refused = await load(client, "new", path)
    assert refused.status_code == status, refused.text
    assert error_of(refused)["param"] == "lora_path"
    assert str(root.parent) not in refused.text
    assert engine.loaded == {}


async def test_absolute_paths_and_links_below_the_root_are_fine(
    client: httpx.AsyncClient, engine: FakeEngine, root: Path
) -> None:
    (root / "latest").symlink_to(root / "sql")
    assert (await load(client, "a", str(root / "sql"))).status_code == 200
    assert (await load(client, "b", "latest")).status_code == 200
    assert engine.loaded == {"a": str(root / "sql"), "b": str(root / "sql")}


@pytest.mark.parametrize("settings", [{}, {"api_key": ["secret"]}, {"lora_root": "."}])
async def test_nobody_may_change_adapters_without_root_and_key(
    model: ServedModel, settings: dict[str, Any]
) -> None:
    app = create_app(Settings(**settings), ModelRegistry([model]))
    async with talking_to(app) as client:
        client.headers.update(KEY)
        for answer in (await load(client, "a", "sql"), await unload(client, "a")):
            assert answer.status_code == 403
            assert error_of(answer)["type"] == "permission_error"


async def test_without_the_key_nothing_is_told(app: FastAPI) -> None:
    async with talking_to(app) as client:
        assert (await load(client, "a", "sql")).status_code == 401


@pytest.mark.parametrize("name", ["a b", "a=b", "a,b", "a\n", "x" * 129, "", 3])
async def test_names_fit_labels_and_lists(client: httpx.AsyncClient, name: Any) -> None:
    refused = await load(client, name, "sql")
    assert refused.status_code == 400
    assert error_of(refused)["param"] == "lora_name"


async def test_the_engine_s_refusal_is_told_and_leaves_nothing(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.refusal = InvalidRequest("The adapter cannot be served: rank 64 is above 16.")
    refused = await load(client, "sql", "sql")
    assert refused.status_code == 400
    assert "rank 64" in error_of(refused)["message"]
    engine.refusal = None
    assert (await complete(client, "sql")).status_code == 404


async def test_an_engine_that_is_not_ready_loads_nothing(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.state = replace(engine.state, stage="loading")
    refused = await load(client, "sql", "sql")
    assert refused.status_code == 503
    assert refused.headers["retry-after"]


async def test_all_engines_or_none(root: Path) -> None:
    engines = [FakeEngine(), FakeEngine(refusal=Unavailable("no", code="loading"))]
    settings = Settings(lora_root=root, api_key=["secret"])  # type: ignore[arg-type, list-item]
    async with talking_to(create_app(settings, ModelRegistry([served(engines)]))) as client:
        client.headers.update(KEY)
        assert (await load(client, "sql", "sql")).status_code == 503
        assert engines[0].loaded == {}
        engines[1].refusal = None
        assert (await load(client, "sql", "sql")).status_code == 200
        assert engines[0].loaded == engines[1].loaded == {"sql": str(root / "sql")}


async def test_two_loads_of_one_name_at_once_are_one(client: httpx.AsyncClient) -> None:
    answers = await asyncio.gather(*(load(client, "sql", "sql") for _ in range(4)))
    assert sorted(answer.status_code for answer in answers) == [200, 400, 400, 400]


async def test_one_the_engine_lost_at_a_restart_is_not_found(
    client: httpx.AsyncClient, model: ServedModel, tmp_path: Path
) -> None:
    model.adapters["old"] = ServedAdapter("old", tmp_path)
    refused = await complete(client, "old")
    assert refused.status_code == 404
    assert error_of(refused)["code"] == "model_not_found"


async def test_metrics_name_the_adapters_in_use(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.state = replace(
        engine.state, max_loras=4, running_adapters=["a", "b"], waiting_adapters=["c"]
    )
    await load(client, "sql", "sql")
    await complete(client, "sql")
    text = (await client.get("/metrics")).text
    (line,) = [line for line in text.splitlines() if line.startswith("vllm:lora_requests_info{")]
    for label in ('max_lora="4"', 'running_lora_adapters="a,b"', 'waiting_lora_adapters="c"'):
        assert label in line
    assert 'model_name="sql"' not in text, "labels must not grow with what clients load"


# ---- settings


@pytest.mark.parametrize(
    "arguments",
    [
        ["--lora-modules", "a=/x", "--lora-modules", "b=/y"],
        ["--lora-modules", "a=/x,b=/y"],
        ["--lora-modules", '{"name": "a", "path": "/x"}', "--lora-modules", "b=/y"],
        ["--lora-modules", '[{"name": "a", "path": "/x", "base_model_name": "m"}, "b=/y"]'],
    ],
)
def test_adapters_are_named_as_vllm_names_them(arguments: list[str]) -> None:
    settings = read_settings(arguments)
    assert settings.adapters == {"a": Path("/x"), "b": Path("/y")}
    assert settings.max_running_loras == 8


def test_adapters_may_stand_in_environment_and_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "pronk.toml"
    file.write_text('[lora-modules]\na = "/x"\nb = "/y=z"\n')
    assert read_settings(["--config", str(file)]).adapters == {"a": Path("/x"), "b": Path("/y=z")}
    monkeypatch.setenv("PRONK_LORA_MODULES", "a=/x,b=/y")
    assert set(read_settings([]).adapters) == {"a", "b"}
    monkeypatch.delenv("PRONK_LORA_MODULES")
    assert read_settings([]).max_running_loras == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["--lora-modules", "a"],
        ["--lora-modules", "=x"],
        ["--lora-modules", "a="],
        ["--lora-modules", "a b=/x"],
        ["--lora-modules", '{"name": "a"}'],
        ["--lora-modules", '{"name": 1, "path": "/x"}'],
        ["--lora-modules", "{"],
        ["--lora-modules", "a=/x", "--lora-modules", "a=/y"],
        ["--lora-modules", "a=/x", "--served-model-name", "a"],
        ["--lora-modules", "a=/x,b=/y", "--max-cpu-loras", "1"],
        ["--max-lora-rank", "0"],
    ],
)
def test_a_mistaken_adapter_is_one_readable_line(arguments: list[str]) -> None:
    with pytest.raises(SettingsProblem) as caught:
        read_settings(arguments)
    assert "\n" not in str(caught.value)
