"""Health, models, tokens, version, documentation, and what the HTTP process may import."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import httpx
import pytest
from fastapi import FastAPI

from service.engine.messages import State
from tests.api.conftest import talking_to
from tests.api.fakes import BOS, USER, FakeEngine

READY = ["/readyz", "/health", "/v2/health/ready"]


@pytest.mark.parametrize("path", ["/livez", "/v2/health/live", *READY])
async def test_a_ready_server_is_healthy_everywhere(client: httpx.AsyncClient, path: str) -> None:
    assert (await client.get(path)).status_code == 200


@pytest.mark.parametrize("path", ["/livez", "/v2/health/live", *READY])
async def test_balancers_may_ask_with_head(
    client: httpx.AsyncClient, engine: FakeEngine, path: str
) -> None:
    assert (await client.head(path)).status_code == 200
    engine.state = State(stage="loading", progress=0.25, reason="because")
    assert (await client.head(path)).status_code == (503 if path in READY else 200)


@pytest.mark.parametrize("stage", ["loading", "warming_up", "restarting", "stalled", "draining"])
async def test_an_unready_server_lives_and_says_why_it_is_not_ready(
    client: httpx.AsyncClient, engine: FakeEngine, stage: str
) -> None:
    engine.state = State(stage=stage, progress=0.25, reason="because")
    for path in READY:
        assert (await client.get(path)).status_code == 503
    found = (await client.get("/readyz")).json()
    assert found == {
        "status": "not_ready",
        "stage": stage,
        "progress": 0.25,
        "reason": "because",
    }
    assert (await client.get("/livez")).status_code == 200


async def test_models_are_listed_under_every_name(client: httpx.AsyncClient) -> None:
    listed = (await client.get("/v1/models")).json()
    assert listed["object"] == "list"
    assert [card["id"] for card in listed["data"]] == ["tiny", "org/alias"]
    card = (await client.get("/v1/models/org/alias")).json()
    assert card == listed["data"][1]
    assert (card["max_model_len"], card["object"]) == (200, "model")
    assert (await client.get("/v1/models/org%2Falias")).json()["id"] == "org/alias"
    missing = await client.get("/v1/models/other")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"


async def test_answers_carry_the_name_they_were_asked_by(client: httpx.AsyncClient) -> None:
    body = {"prompt": "x", "model": "org/alias"}
    assert (await client.post("/v1/completions", json=body)).json()["model"] == "org/alias"


async def test_tokenize_and_detokenize_are_inverse(client: httpx.AsyncClient) -> None:
    found = (await client.post("/tokenize", json={"prompt": "Hé"})).json()
    assert found == {"count": 4, "max_model_len": 200, "tokens": [BOS, 72, 195, 169]}
    back = await client.post("/detokenize", json={"tokens": found["tokens"]})
    assert back.json() == {"prompt": "<s>Hé"}
    bare = {"prompt": "<s>", "add_special_tokens": False, "parse_special_tokens": False}
    assert (await client.post("/tokenize", json=bare)).json()["tokens"] == list(b"<s>")


async def test_tokenize_takes_conversations(client: httpx.AsyncClient) -> None:
    body = {
        "messages": [{"role": "user", "content": "Hi"}],
        "add_generation_prompt": False,
        "return_token_strs": True,
    }
    found = (await client.post("/tokenize", json=body)).json()
    assert found["tokens"] == [BOS, USER, *b"user: Hi\n"]
    assert found["token_strs"][:2] == ["<s>", "<|user|>"]


@pytest.mark.parametrize("body", [{}, {"prompt": "x", "messages": []}, {"prompt": 5}])
async def test_tokenize_wants_one_of_two(client: httpx.AsyncClient, body: object) -> None:
    assert (await client.post("/tokenize", json=body)).status_code == 400


async def test_detokenize_wants_ids_of_the_vocabulary(client: httpx.AsyncClient) -> None:
    response = await client.post("/detokenize", json={"tokens": [1, 264]})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "tokens[1]"


async def test_version_is_the_packages(client: httpx.AsyncClient) -> None:
    from service import __version__

    assert (await client.get("/version")).json() == {"version": __version__}


async def test_documentation_describes_bodies_and_errors(client: httpx.AsyncClient) -> None:
    page = (await client.get("/openapi.json")).json()
    operation = page["paths"]["/v1/completions"]["post"]
    body = operation["requestBody"]["content"]["application/json"]["schema"]
    assert body == {"$ref": "#/components/schemas/CompletionRequest"}
    assert {"200", "400", "401", "429", "503"} <= set(operation["responses"])
    schemas = page["components"]["schemas"]
    assert {"CompletionRequest", "Completion", "ChatCompletion", "ErrorEnvelope"} <= set(schemas)


async def test_documentation_can_be_switched_off(make_app: Callable[..., FastAPI]) -> None:
    async with talking_to(make_app(docs=False)) as client:
        assert (await client.get("/docs")).status_code == 404
        assert (await client.get("/openapi.json")).status_code == 404


def test_the_http_process_imports_no_torch() -> None:
    code = (
        "import sys; import service.api.app, service.engine.client, model.chat_template;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
