"""One envelope for every failure; ids, ignored fields, odd bodies, loading and draining."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import given, settings
from hypothesis import strategies as st

from service.api.app import create_app
from service.engine.messages import State
from service.registry import ModelRegistry
from service.settings import Settings
from tests.api.conftest import talking_to, until
from tests.api.fakes import FakeEngine, served

URL = "/v1/completions"
JSON = {"Content-Type": "application/json"}


def error_of(response: httpx.Response) -> dict[str, Any]:
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["code"] is None or isinstance(body["error"]["code"], str)
    return body["error"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[1]",
        b'"text"',
        b'{"prompt": "x", "temperature": NaN}',
        b'{"prompt": "x", "temperature": Infinity}',
        b'{"prompt": "x", "temperature": -Infinity}',
        b'{"prompt": "x", "temperature": 1e999}',
        b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}",
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "\\udc00 x"}',
        b'{"prompt": "\xff"}',
        b'{"prompt": ' + b"[" * 100_000,
        b'{"prompt": "x", "metadata": ' + b'{"a":' * 5000 + b"1" + b"}" * 5000 + b"}",
        b'{"prompt": "x"} trailing',
    ],
)
async def test_a_body_that_is_no_good_json_is_a_400(client: httpx.AsyncClient, body: bytes) -> None:
    response = await client.post(URL, content=body, headers=JSON)
    assert response.status_code == 400, response.text[:200]
    assert error_of(response)["type"] == "invalid_request_error"


@settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["prompt", "stop", "n", "logit_bias", "stream_options", "metadata", "x"]),
        st.recursive(
            st.none()
            | st.booleans()
            | st.integers()
            | st.floats(allow_nan=False, allow_infinity=False)
            | st.text(),
            lambda inner: (
                st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
            ),
            max_leaves=8,
        ),
    )
)
async def test_no_body_makes_a_500(body: dict[str, Any]) -> None:
    app = create_app(Settings(), ModelRegistry([served(FakeEngine())]))
    async with talking_to(app) as client:
        response = await client.post(URL, json=body)
    assert response.status_code in (200, 400), response.text
    if response.status_code == 400:
        error_of(response)


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded"])
async def test_only_json_is_taken(client: httpx.AsyncClient, kind: str | None) -> None:
    headers = {} if kind is None else {"Content-Type": kind}
    response = await client.post(URL, content=b'{"prompt": "x"}', headers=headers)
    assert response.status_code == 415
    assert error_of(response)["type"] == "invalid_request_error"


@pytest.mark.parametrize("path", ["/", "/nothing", "/v1", "/v1/", "/v1/completions/", "//livez"])
async def test_unknown_routes_are_404_in_the_envelope(client: httpx.AsyncClient, path: str) -> None:
    response = await client.get(f"http://pronk{path}")
    assert response.status_code == 404
    assert error_of(response)["type"] == "not_found_error"


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [("GET", URL, "POST"), ("POST", "/v1/models", "GET"), ("DELETE", "/livez", "GET")],
)
async def test_wrong_methods_are_405_with_the_right_ones(
    client: httpx.AsyncClient, method: str, path: str, allowed: str
) -> None:
    response = await client.request(method, path)
    assert response.status_code == 405
    assert response.headers["allow"] == allowed
    assert error_of(response)["type"] == "invalid_request_error"


async def test_unknown_models_are_404_by_name(client: httpx.AsyncClient) -> None:
    response = await client.post(URL, json={"prompt": "x", "model": "gpt-5"})
    assert response.status_code == 404
    error = error_of(response)
    assert (error["type"], error["code"]) == ("not_found_error", "model_not_found")
    assert error["param"] == "model"


# ---- the body's bounds


async def test_a_body_over_the_limit_is_a_413_by_its_stated_length(
    make_app: Callable[..., FastAPI],
) -> None:
    async with talking_to(make_app(max_body_bytes=2048)) as client:
        response = await client.post(URL, json={"prompt": "x" * 3000})
    assert response.status_code == 413
    assert error_of(response)["code"] == "request_too_large"


async def test_a_body_over_the_limit_is_a_413_while_it_streams_in(
    make_app: Callable[..., FastAPI],
) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 1024
            yield b" " * 1024

    async with talking_to(make_app(max_body_bytes=4096)) as client:
        response = await client.post(URL, content=endless(), headers=JSON)
    assert response.status_code == 413
    assert sent <= 8192


async def test_a_body_that_never_comes_is_given_up(make_app: Callable[..., FastAPI]) -> None:
    async def slow() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(5)
        yield b"}"

    async with talking_to(make_app(body_timeout=0.05)) as client:
        response = await client.post(URL, content=slow(), headers=JSON)
    assert response.status_code == 408
    assert error_of(response)["type"] == "invalid_request_error"


# ---- request ids


async def test_plain_request_ids_come_back_and_others_are_replaced(
    client: httpx.AsyncClient,
) -> None:
    response = await client.get("/livez", headers={"X-Request-Id": "abc-1.2_X"})
    assert response.headers["x-request-id"] == "abc-1.2_X"
    for odd in ("a b", "x" * 129, "", "a/b", "ä"):
        response = await client.get("/livez", headers={"X-Request-Id": odd.encode("latin-1")})
        assert response.headers["x-request-id"].startswith("req-")


async def test_errors_and_streams_have_a_request_id_too(client: httpx.AsyncClient) -> None:
    assert (await client.get("/nothing")).headers["x-request-id"]
    response = await client.post(URL, json={"prompt": "x", "stream": True})
    assert response.headers["x-request-id"]


# ---- ignored fields


async def test_unknown_fields_are_named_in_a_header(client: httpx.AsyncClient) -> None:
    body = {
        "prompt": "Hi",
        "größe": 1,
        "a,b": True,
        "absent": None,
        "store": True,
        "stream": True,
        "stream_options": {"include_usage": True, "odd": 1},
    }
    response = await client.post(URL, json=body)
    assert response.status_code == 200
    names = response.headers["x-ignored-params"].split(", ")
    assert names == ["store", "gr%C3%B6%C3%9Fe", "a%2Cb", "stream_options.odd"]


async def test_unknown_fields_of_messages_are_named_by_their_paths(
    client: httpx.AsyncClient,
) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "x", "odd": 1}], "odder": 2}]
    response = await client.post("/v1/chat/completions", json={"messages": messages})
    names = set(response.headers["x-ignored-params"].split(", "))
    assert names == {"messages[0].odder", "messages[0].content[0].odd"}


async def test_at_most_twenty_ignored_fields_are_named(client: httpx.AsyncClient) -> None:
    response = await client.post(URL, json={"prompt": "x"} | {f"f{i}": 1 for i in range(50)})
    assert len(response.headers["x-ignored-params"].split(", ")) == 20


async def test_strict_refuses_what_would_be_ignored(
    client: httpx.AsyncClient, make_app: Callable[..., FastAPI]
) -> None:
    response = await client.post(URL, json={"prompt": "x", "odd": 1, "strict": True})
    assert response.status_code == 400
    assert error_of(response)["param"] == "odd"
    assert (await client.post(URL, json={"prompt": "x", "strict": True})).status_code == 200
    async with talking_to(make_app(strict_params=True)) as strict:
        assert (await strict.post(URL, json={"prompt": "x", "odd": 1})).status_code == 400


# ---- loading, restarting, draining


@pytest.mark.parametrize(
    ("stage", "code"),
    [
        ("starting", "loading"),
        ("loading", "loading"),
        ("warming_up", "loading"),
        ("restarting", "engine_restarting"),
        ("stalled", "engine_restarting"),
        ("draining", "draining"),
    ],
)
async def test_work_is_refused_with_the_reason_and_a_time(
    client: httpx.AsyncClient, engine: FakeEngine, stage: str, code: str
) -> None:
    engine.state = State(stage=stage)
    response = await client.post(URL, json={"prompt": "x"})
    assert response.status_code == 503
    assert response.headers["retry-after"] == "2"
    error = error_of(response)
    assert (error["type"], error["code"]) == ("service_unavailable", code)


async def test_a_model_without_its_tokenizer_is_still_loading(
    make_app: Callable[..., FastAPI],
) -> None:
    app = make_app()
    app.state.server.models.get(None, None).tokenizer = None
    async with talking_to(app) as client:
        for path in (URL, "/tokenize", "/v1/chat/completions"):
            body = (
                {"prompt": "x"}
                if "chat" not in path
                else {"messages": [{"role": "user", "content": "x"}]}
            )
            response = await client.post(path, json=body)
            assert response.status_code == 503
            assert error_of(response)["code"] == "loading"
        assert (await client.get("/readyz")).status_code == 503


async def test_draining_refuses_new_work_while_streams_finish(
    make_app: Callable[..., FastAPI], engine: FakeEngine
) -> None:
    app = make_app()
    engine.gate = asyncio.Event()
    async with talking_to(app) as client:
        running = asyncio.create_task(client.post(URL, json={"prompt": "x", "stream": True}))
        await until(lambda: engine.live)
        app.state.draining = True
        assert (await client.get("/readyz")).json()["stage"] == "draining"
        response = await client.post(URL, json={"prompt": "x"})
        assert response.status_code == 503
        assert error_of(response)["code"] == "draining"
        assert response.headers["retry-after"]
        engine.gate.set()
        assert (await running).text.endswith("data: [DONE]\n\n")


async def test_with_a_delay_work_is_taken_until_the_engine_drains(
    make_app: Callable[..., FastAPI], engine: FakeEngine
) -> None:
    app = make_app(drain_delay=5)
    app.state.draining = True
    async with talking_to(app) as client:
        assert (await client.get("/readyz")).status_code == 503
        assert (await client.post(URL, json={"prompt": "x"})).status_code == 200
        engine.state = State(stage="draining")
        assert (await client.post(URL, json={"prompt": "x"})).status_code == 503
