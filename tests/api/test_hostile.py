"""Bodies and readers that mean harm, over every route with a body: a 4xx, quickly, and no harm."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from tests.api.conftest import Reader, chunks_of, scope_of, talking_to, until
from tests.api.fakes import FakeEngine

JSON = {"Content-Type": "application/json"}
GOOD: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "Hi"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}]},
    "/tokenize": {"prompt": "Hi"},
    "/detokenize": {"tokens": [65]},
}
GENERATING = ["/v1/completions", "/v1/chat/completions"]
HUGE = b"9" * 4000

every_route = pytest.mark.parametrize("path", GOOD)
generating = pytest.mark.parametrize("path", GENERATING)


async def refused(client: httpx.AsyncClient, path: str, body: bytes) -> dict[str, Any]:
    """The error of a 4xx that came within a second."""
    began = time.perf_counter()
    response = await client.post(path, content=body, headers=JSON)
    assert time.perf_counter() - began < 2
    assert response.status_code in (400, 413), response.text[:300]
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert len(error["message"]) < 1000
    return error


def with_raw(path: str, field: str, value: bytes) -> bytes:
    """A good body of the route with one more field, spelled as no encoder would."""
    good = json.dumps(GOOD[path]).encode()
    return good[:-1] + b', "' + field.encode() + b'": ' + value + b"}"


@every_route
@pytest.mark.parametrize(
    "value",
    [
        b"[" * 50_000 + b"]" * 50_000,
        b'{"a":' * 20_000 + b"1" + b"}" * 20_000,
        b"NaN",
        b"-Infinity",
        b"1e999",
        b'"\\ud83d"',
        b'"\\udc00\\ud800"',
        b'"\xed\xa0\x80"',
        b'"\x00"',
    ],
    ids=["lists", "objects", "nan", "infinity", "overflow", "high", "low", "cesu", "control"],
)
async def test_json_no_decoder_should_take_is_refused_whatever_the_field(
    client: httpx.AsyncClient, engine: FakeEngine, path: str, value: bytes
) -> None:
    error = await refused(client, path, with_raw(path, "some_field", value))
    assert error["type"] == "invalid_request_error"
    assert engine.submitted == []


@generating
@pytest.mark.parametrize(
    "field",
    ["seed", "n", "max_tokens", "top_k", "priority", "min_tokens", "logprobs", "deadline_ms"],
)
@pytest.mark.parametrize("value", [HUGE, b"-" + HUGE, b"1e300", b"9223372036854775808"])
async def test_huge_numbers_are_refused_by_their_field(
    client: httpx.AsyncClient, engine: FakeEngine, path: str, field: str, value: bytes
) -> None:
    error = await refused(client, path, with_raw(path, field, value))
    assert error["param"] in (field, None)  # None: no JSON number for the decoder either
    assert engine.submitted == []


@generating
@pytest.mark.parametrize("token", [264, -1, 2**31, 2**63])
async def test_ids_that_are_no_tokens_reach_no_engine(
    client: httpx.AsyncClient, engine: FakeEngine, path: str, token: int
) -> None:
    fields: list[dict[str, Any]] = [
        {"stop_token_ids": [65, token]},
        {"allowed_token_ids": [token]},
        {"logit_bias": {str(token): 1}},
    ]
    if path == "/v1/completions":
        fields += [{"prompt": [65, token]}, {"prompt": [[65], [token]]}]
    for one in fields:
        error = await refused(client, path, json.dumps(GOOD[path] | one).encode())
        assert error["param"] is not None
        assert error["param"].startswith(next(iter(one)))
    assert engine.submitted == []


@pytest.mark.parametrize("token", [264, -1, 2**63])
async def test_ids_that_are_no_tokens_have_no_text(client: httpx.AsyncClient, token: int) -> None:
    body = json.dumps({"tokens": [65, token]}).encode()
    error = await refused(client, "/detokenize", body)
    assert error["param"].startswith("tokens")


@generating
@pytest.mark.parametrize("field", ["stop", "bad_words", "stop_token_ids", "allowed_token_ids"])
async def test_ten_thousand_of_anything_are_refused_or_harmless(
    client: httpx.AsyncClient, path: str, field: str
) -> None:
    values = [f"stop {i}" for i in range(10_000)]
    many: list[Any] = values if field in ("stop", "bad_words") else list(range(264)) * 40
    began = time.perf_counter()
    response = await client.post(path, json=GOOD[path] | {field: many})
    assert time.perf_counter() - began < 2
    if field in ("stop", "bad_words"):
        assert response.status_code == 400
        assert response.json()["error"]["param"] == field
        assert len(response.content) < 1000
    else:
        assert response.status_code in (200, 400)


async def test_a_stop_string_of_a_megabyte_costs_no_more_than_reading_it(
    client: httpx.AsyncClient,
) -> None:
    began = time.perf_counter()
    body = {"prompt": "Hi", "stop": ["a" * 1_000_000 + "b"], "max_tokens": 50}
    response = await client.post("/v1/completions", json=body)
    assert response.status_code in (200, 400)
    assert time.perf_counter() - began < 3


@every_route
async def test_a_body_over_the_limit_is_refused_before_any_of_it_is_read(
    make_app: Callable[..., FastAPI], path: str
) -> None:
    """By its stated length alone: nothing is received."""
    received = 0
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        nonlocal received
        received += 1
        return {"type": "http.request", "body": b"{}", "more_body": True}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = scope_of(path)
    scope["headers"].append((b"content-length", b"999999999999"))
    await make_app()(scope, receive, send)
    assert sent[0]["status"] == 413
    assert received == 0


@generating
async def test_last_event_id_changes_nothing(client: httpx.AsyncClient, path: str) -> None:
    body = GOOD[path] | {"stream": True}
    response = await client.post(path, json=body, headers={"Last-Event-ID": "17"})
    assert response.status_code == 200
    assert len(chunks_of(response.text)) > 10
    assert "x-ignored-params" not in response.headers
    assert "\nid:" not in response.text


@generating
async def test_a_failure_in_the_middle_is_one_error_event_and_then_the_end(
    client: httpx.AsyncClient, engine: FakeEngine, path: str
) -> None:
    engine.fail_after = 3
    response = await client.post(path, json=GOOD[path] | {"stream": True})
    *chunks, last = chunks_of(response.text)
    assert response.status_code == 200
    assert all("error" not in chunk for chunk in chunks)
    assert len(chunks) >= 3
    assert set(last) == {"error"}
    error = last["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["code"]) == ("server_error", "engine_failure")
    assert engine.live == 0


@generating
async def test_a_reader_that_stops_reading_holds_one_chunk_up_and_no_more(
    make_app: Callable[..., FastAPI], engine: FakeEngine, path: str
) -> None:
    """While it does not read nothing piles up here, others are served, and hanging up frees all."""
    engine.script = lambda prompt, one: [65]
    app = make_app()
    reader = Reader(GOOD[path] | {"stream": True, "max_tokens": 150})
    serving = asyncio.create_task(app(scope_of(path), reader.receive, reader.send))
    await until(lambda: engine.generations and engine.generations[0].given)
    async with talking_to(app) as client:
        response = await client.post(path, json=GOOD[path] | {"max_tokens": 20})
        assert response.status_code == 200
    assert engine.generations[0].given <= 2
    reader.gone.set()
    await serving
    assert engine.live == 0


@generating
@pytest.mark.parametrize("tier", ["auto", "default", "flex", "priority", "scale", "anything"])
async def test_a_service_tier_is_taken_and_the_one_there_is_is_told(
    client: httpx.AsyncClient, path: str, tier: str
) -> None:
    """OpenAI's chat answers say which tier they were made by; completions never do."""
    wanted = "default" if path == "/v1/chat/completions" else None
    response = await client.post(path, json=GOOD[path] | {"service_tier": tier})
    assert response.status_code == 200
    assert "x-ignored-params" not in response.headers
    assert response.json().get("service_tier") == wanted
    stream = await client.post(path, json=GOOD[path] | {"service_tier": tier, "stream": True})
    assert {chunk.get("service_tier") for chunk in chunks_of(stream.text)} == {wanted}
    assert "service_tier" not in (await client.post(path, json=GOOD[path])).json()
