"""A key's limits on the wire: headers, refusals, and tokens settled to what was made."""

from __future__ import annotations

import asyncio
import functools
import json
import re
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from service.engine.messages import Output
from service.errors import EngineFailure, EngineLost, Overloaded
from service.keys.key import hash_of
from service.keys.limits import Clocks, KeyLimits
from tests.api.conftest import Reader, scope_of, until
from tests.api.fakes import FakeEngine, FakeGeneration, say
from tests.api.test_key_rights import ASKED, rejections

LIMITS = """
requests_per_minute = 60
tokens_per_minute = 1000
max_concurrency = 50
tokens_per_day = 5000
"""
HEADERS = {"Authorization": "Bearer alice-key"}
PROMPT = len("Hi") + 1  # tokens; the begin token is one


class Fixture:
    """An app whose clock stands still, the one key, and a client with it."""

    def __init__(self, app: FastAPI, client: httpx.AsyncClient, engine: FakeEngine) -> None:
        self.app, self.client, self.engine = app, client, engine
        self.now = 1_800_000_000.0

    @property
    def limits(self) -> KeyLimits:
        found = self.app.state.server.limits.of(hash_of("alice-key")[:16])
        assert found is not None
        return found

    def left(self, name: str = "tokens") -> int:
        return next(one.remaining for one in self.limits.standings() if one.name == name)

    async def post(self, path: str = "/v1/completions", **body: Any) -> httpx.Response:
        return await self.client.post(path, json=(ASKED[path] | body), headers=HEADERS)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    def write(limits: str) -> Path:
        path = tmp_path / "keys.toml"
        path.write_text(f'[keys.alice]\nsha256 = "{hash_of("alice-key")}"\n{limits}')
        path.chmod(0o600)
        return path

    return write


@pytest.fixture
async def make(
    make_app: Callable[..., FastAPI], engine: FakeEngine, write: Callable[[str], Path]
) -> AsyncIterator[Callable[..., Fixture]]:
    clients = []

    def make(limits: str = LIMITS, **settings: Any) -> Fixture:
        app = make_app(api_keys_file=write(limits), **settings)
        app.state.server.models.models[0].hidden_size = 4
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        clients.append(httpx.AsyncClient(transport=transport, base_url="http://pronk"))
        made = Fixture(app, clients[-1], engine)
        found = app.state.server.limits
        found.clocks = Clocks(lambda: made.now, lambda: made.now)
        keys = app.state.server.keyring.from_file
        found.install([])
        found.install(keys)
        return made

    yield make
    for client in clients:
        await client.aclose()


@pytest.fixture
def it(make: Callable[..., Fixture]) -> Fixture:
    return make()


# ---- headers


async def test_every_answer_of_a_limited_key_tells_how_it_stands(it: Fixture) -> None:
    answer = await it.post(max_tokens=20)
    used = answer.json()["usage"]["total_tokens"]
    told = {name: value for name, value in answer.headers.items() if "ratelimit" in name}
    assert told == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "59",
        "x-ratelimit-reset-requests": "1s",
        "x-ratelimit-limit-tokens": "1000",
        "x-ratelimit-remaining-tokens": str(1000 - used),
        "x-ratelimit-reset-tokens": f"{used * 60}ms",
        "x-ratelimit-limit-concurrency": "50",
        "x-ratelimit-remaining-concurrency": "49",
        "x-ratelimit-limit-tokens-day": "5000",
        "x-ratelimit-remaining-tokens-day": str(5000 - used),
        "x-ratelimit-reset-tokens-day": "16h0m0s",
    }
    for path in ("/v1/models", "/version", "/nowhere", "/metrics"):
        got = await it.client.get(path, headers=HEADERS)
        assert got.headers["x-ratelimit-remaining-requests"] == "59", "only POST is counted"
    wrong = await it.post(max_tokens=-1)
    assert wrong.status_code == 400
    assert wrong.headers["x-ratelimit-remaining-requests"] == "58"
    stranger = await it.client.get("/v1/models")
    assert not [name for name in stranger.headers if "ratelimit" in name]


async def test_anthropics_routes_tell_it_in_their_words_too(it: Fixture) -> None:
    answer = await it.post("/v1/messages")
    assert answer.headers["anthropic-ratelimit-requests-limit"] == "60"
    assert answer.headers["anthropic-ratelimit-requests-remaining"] == "59"
    assert answer.headers["anthropic-ratelimit-tokens-limit"] == "1000"
    reset = answer.headers["anthropic-ratelimit-tokens-reset"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", reset)


async def test_a_stream_tells_it_before_it_has_used_anything(it: Fixture) -> None:
    body = {"prompt": "Hi", "stream": True, "max_tokens": 100}
    async with it.client.stream("POST", "/v1/completions", json=body, headers=HEADERS) as answer:
        assert answer.headers["x-ratelimit-remaining-tokens"] == str(1000 - 100 - PROMPT)


async def test_keys_without_limits_are_told_of_none(make: Callable[..., Fixture]) -> None:
    answer = await make("").post()
    assert answer.status_code == 200
    assert not [name for name in answer.headers if "ratelimit" in name]


# ---- refusals


async def test_over_the_request_rate_is_429_until_the_moment_it_told(
    make: Callable[..., Fixture],
) -> None:
    it = make("requests_per_minute = 2")
    assert [(await it.post()).status_code for _ in range(3)] == [200, 200, 429]
    refused = await it.post()
    error = refused.json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    assert refused.headers["retry-after"] == "30"
    assert refused.headers["retry-after-ms"] == "30000"
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    it.now += 29
    assert (await it.post()).status_code == 429
    it.now += 1
    assert (await it.post()).status_code == 200
    assert rejections(it.app) == {("alice", "requests"): 3}


async def test_a_refused_rate_leaves_the_body_unread(make: Callable[..., Fixture]) -> None:
    it, read = make("requests_per_minute = 1"), False
    await it.post()

    async def body() -> AsyncIterator[bytes]:
        nonlocal read
        read = True
        yield b"{}"

    refused = await it.client.post("/v1/completions", content=body(), headers=HEADERS)
    assert refused.status_code == 429
    assert not read


async def test_over_the_token_rate_is_429_before_the_engine_hears_of_it(it: Fixture) -> None:
    held = it.limits.reserve(900)
    refused = await it.post(max_tokens=100)
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert int(refused.headers["retry-after"]) == 1
    assert int(refused.headers["retry-after-ms"]) == pytest.approx(180, abs=1)
    assert it.engine.submitted == []
    held.settle(0)
    assert (await it.post(max_tokens=100)).status_code == 200
    assert rejections(it.app) == {("alice", "tokens"): 1}


async def test_a_request_that_can_never_fit_is_not_told_to_come_back(it: Fixture) -> None:
    refused = await it.post(max_tokens=50, n=20)
    assert refused.status_code == 429
    assert "retry-after" not in refused.headers
    assert refused.headers["x-should-retry"] == "false"


async def test_a_spent_quota_has_its_own_code_and_ends_at_midnight(it: Fixture) -> None:
    for _ in range(5):
        it.limits.reserve(990).settle(990)
        it.now += 60
    refused = await it.post(max_tokens=60)
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "insufficient_quota"
    assert refused.headers["x-should-retry"] == "false"
    assert int(refused.headers["retry-after"]) == 16 * 3600 - 300
    it.now += 16 * 3600 - 300
    assert (await it.post(max_tokens=60)).status_code == 200


async def test_anthropics_routes_keep_their_envelope(make: Callable[..., Fixture]) -> None:
    it = make("requests_per_minute = 1")
    await it.post("/v1/messages")
    refused = await it.post("/v1/messages")
    assert refused.status_code == 429
    assert refused.json()["type"] == "error"
    assert refused.json()["error"]["type"] == "rate_limit_error"


async def test_requests_at_a_time_are_those_being_answered(
    make: Callable[..., Fixture], engine: FakeEngine
) -> None:
    it, engine.gate = make("max_concurrency = 2"), asyncio.Event()
    running = [asyncio.create_task(it.post()) for _ in range(2)]
    await until(lambda: engine.live == 2)
    refused = await it.post()
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1
    assert (await it.client.get("/v1/models", headers=HEADERS)).status_code == 200
    engine.gate.set()
    assert [answer.status_code for answer in await asyncio.gather(*running)] == [200, 200]
    assert (await it.post()).status_code == 200
    assert it.limits.active == 0


# ---- what is counted


@pytest.mark.parametrize("path", sorted(ASKED))
async def test_every_route_counts_once_and_settles_to_its_usage(
    it: Fixture, engine: FakeEngine, path: str
) -> None:
    engine.pooled = b"\0\0\x80\x3f" * 4
    answer = await it.post(path)
    assert answer.status_code == 200, answer.text
    assert it.left("requests") == 59
    assert it.limits.active == 0
    usage = answer.json().get("usage", {})
    total = usage.get("total_tokens", usage.get("input_tokens", 0) + usage.get("output_tokens", 0))
    assert 5000 - it.left("tokens-day") == total
    assert 1000 - it.left() == total
    is_free = path in ("/tokenize", "/detokenize", "/v1/estimate") or "count" in path
    assert (total == 0) == (is_free or path.endswith("input_tokens"))


async def test_a_stream_settles_to_its_usage(it: Fixture) -> None:
    options = {"include_usage": True}
    answer = await it.post(stream=True, stream_options=options, max_tokens=100)
    chunks = [
        json.loads(line[6:]) for line in answer.text.split("\n\n") if line.startswith("data: {")
    ]
    assert 1000 - it.left() == chunks[-1]["usage"]["total_tokens"]


async def test_choices_count_each_and_prompts_once(it: Fixture, engine: FakeEngine) -> None:
    engine.script = lambda prompt, settings: say("abc")
    answer = await it.post(prompt=["Hi", "Ho!"], n=3, max_tokens=50)
    usage = answer.json()["usage"]
    assert usage["total_tokens"] == PROMPT + PROMPT + 1 + 6 * 4
    assert 1000 - it.left() == usage["total_tokens"]


async def hang_up_after(it: Fixture, tokens: int) -> None:
    """A client that leaves a stream in which so many tokens came."""
    reader = Reader({"prompt": "Hi", "stream": True, "max_tokens": 100})
    reader.may_read.set()
    scope = scope_of("/v1/completions")
    scope["headers"].append((b"authorization", b"Bearer alice-key"))
    task = asyncio.create_task(it.app(scope, reader.receive, reader.send))
    await until(lambda: reader.text.count('"text"') >= tokens and it.engine.live == 1)
    assert 1000 - it.left() == 100 + PROMPT, "held while it runs"
    reader.gone.set()
    await task


async def test_a_cancelled_stream_pays_for_what_was_made(it: Fixture, engine: FakeEngine) -> None:
    engine.script = lambda prompt, settings: [65] * 400
    engine.pause = 0.01
    await hang_up_after(it, 3)
    spent = 1000 - it.left()
    assert PROMPT + 3 <= spent < PROMPT + 100
    assert spent == PROMPT + engine.generations[0].given
    assert it.limits.active == 0
    assert it.left("tokens-day") == 5000 - spent


async def test_a_client_that_leaves_before_the_first_token_pays_for_its_prompt(
    it: Fixture, engine: FakeEngine
) -> None:
    engine.gate = asyncio.Event()
    await hang_up_after(it, 0)
    assert 1000 - it.left() == PROMPT


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_what_the_server_fails_on_costs_what_came_of_it(
    it: Fixture, engine: FakeEngine, is_streamed: bool
) -> None:
    engine.fail_after = 2
    await it.post(stream=is_streamed, max_tokens=100)
    assert 1000 - it.left() == PROMPT + 2


async def test_an_answer_that_a_second_engine_begins_anew_costs_no_more_than_was_held(
    it: Fixture, engine: FakeEngine
) -> None:
    class DiesOnce(FakeGeneration):
        async def __anext__(self) -> Output:
            if self.number == 0 and self.given == 80:
                raise EngineLost("it died")
            return await super().__anext__()

    engine.script = lambda prompt, settings: [65] * 400
    engine.generation = functools.partial(DiesOnce, engine)  # type: ignore[method-assign]
    answer = await it.post(max_tokens=100)
    assert len(engine.submitted) == 2
    assert answer.json()["usage"]["total_tokens"] == PROMPT + 100
    assert 5000 - it.left("tokens-day") == PROMPT + 100


@pytest.mark.parametrize("error", [Overloaded("full"), EngineFailure("gone")])
async def test_what_the_engine_refuses_costs_no_token(
    it: Fixture, engine: FakeEngine, error: Exception
) -> None:
    engine.refusal = error  # type: ignore[assignment]
    assert (await it.post(max_tokens=100)).status_code in (429, 500)
    assert it.left() == 1000
    assert it.left("tokens-day") == 5000


# ---- budgets nobody stated


async def test_a_default_budget_is_cut_to_what_the_key_may_have(
    make: Callable[..., Fixture], engine: FakeEngine
) -> None:
    it = make("tokens_per_day = 60")
    messages = [{"role": "user", "content": "Hi"}]
    first = await it.post("/v1/chat/completions", messages=messages)
    assert first.status_code == 200, first.text
    [settings] = engine.submitted[0]["settings"]  # type: ignore[misc]
    prompt = first.json()["usage"]["prompt_tokens"]
    assert settings.max_tokens == 60 - prompt
    stated = await it.post("/v1/chat/completions", messages=messages, max_tokens=60)
    assert stated.status_code == 429, "what is stated is never cut in silence"


async def test_choices_of_a_default_budget_share_what_the_key_may_have(
    make: Callable[..., Fixture], engine: FakeEngine
) -> None:
    it = make("tokens_per_minute = 100")
    answer = await it.post("/v1/chat/completions", n=3)
    assert answer.status_code == 200, answer.text
    prompt = answer.json()["usage"]["prompt_tokens"]
    for one in engine.submitted[0]["settings"]:  # type: ignore[attr-defined]
        assert one.max_tokens == (100 - prompt) // 3


async def test_browsers_may_read_the_limits(make: Callable[..., Fixture]) -> None:
    it = make(allowed_origins=["https://a.example"])
    headers = HEADERS | {"Origin": "https://a.example"}
    answer = await it.client.get("/v1/models", headers=headers)
    exposed = answer.headers["access-control-expose-headers"].lower()
    for name in answer.headers:
        assert "ratelimit" not in name or name in exposed
