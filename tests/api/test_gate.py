"""Refused before it costs anything: no room, too many bodies at a time, too much in one request."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from msgspec.structs import replace

from service.api.app import create_app
from service.api.exchange import Caller, Exchange
from service.api.gate import Gate
from service.engine.messages import State
from service.errors import Overloaded
from service.registry import ModelRegistry
from service.settings import Settings
from tests.api.conftest import refuse, scope_of, talking_to, until
from tests.api.fakes import FakeEngine, served

URL = "/v1/completions"
FULL = State(stage="ready", room=0, retry_after=7.2, is_shut=True)


class Uploader:
    """An ASGI client whose body comes in pieces, the next one only when it may."""

    def __init__(self, pieces: list[bytes]) -> None:
        self.pieces = pieces
        self.messages: list[Any] = []
        self.may_send = asyncio.Event()
        self.num_asked = 0
        self.answered = asyncio.Event()

    async def receive(self) -> dict[str, Any]:
        self.num_asked += 1
        if not self.pieces:
            await asyncio.Event().wait()
        if self.num_asked > 1:
            await self.may_send.wait()
        piece = self.pieces.pop(0)
        return {"type": "http.request", "body": piece, "more_body": bool(self.pieces)}

    async def send(self, message: Any) -> None:
        self.messages.append(message)

    @property
    def status(self) -> int:
        return int(self.messages[0]["status"])

    async def run(self, app: FastAPI) -> None:
        await app(scope_of(URL), self.receive, self.send)


def make_app(engine: FakeEngine, **settings: Any) -> FastAPI:
    return create_app(Settings(**settings), ModelRegistry([served(engine)]))


@pytest.fixture
async def full(engine: FakeEngine) -> AsyncIterator[httpx.AsyncClient]:
    engine.state = FULL
    async with talking_to(make_app(engine)) as client:
        yield client


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        (URL, 429, "queue_full"),
        ("/v1/chat/completions", 429, "queue_full"),
        ("/v1/responses", 429, "queue_full"),
        ("/v1/embeddings", 429, "queue_full"),
        ("/v1/score", 429, "queue_full"),
        ("/v1/messages", 529, None),
    ],
)
async def test_a_full_queue_refuses_on_every_route_with_the_engine_s_time(
    full: httpx.AsyncClient, path: str, status: int, code: str | None
) -> None:
    response = await full.post(path, content=b"this is not even read")
    assert response.status_code == status
    assert response.headers["retry-after"] == "8"
    assert response.json()["error"].get("code") == code


async def test_a_full_queue_refuses_before_it_reads_a_byte(engine: FakeEngine) -> None:
    engine.state = FULL
    client = Uploader([b"{}"])
    await client.run(make_app(engine))
    assert client.status == 429
    assert client.num_asked == 0
    assert engine.submitted == []


async def test_a_queue_that_one_key_has_filled_is_open_to_others(engine: FakeEngine) -> None:
    app = make_app(engine, api_key=["crowd", "victim"])
    crowd = app.state.server.keyring.find("crowd").id
    engine.state = replace(FULL, is_shut=False, refused={crowd: 3.0})
    async with talking_to(app) as client:
        for key, status in (("crowd", 429), ("victim", 200)):
            headers = {"Authorization": f"Bearer {key}"}
            response = await client.post(URL, json={"prompt": "Hi"}, headers=headers)
            assert response.status_code == status, response.text


async def test_what_needs_no_place_is_served_beside_a_full_queue(full: httpx.AsyncClient) -> None:
    response = await full.post("/tokenize", json={"prompt": "Hi"})
    assert response.status_code == 200, response.text
    assert (await full.get("/livez")).status_code == 200


async def test_refusals_at_the_gate_are_in_the_books(full: httpx.AsyncClient) -> None:
    for _ in range(3):
        await full.post(URL, json={"prompt": "Hi"})
    text = (await full.get("/metrics")).text
    assert re.search(r'^vllm:admission_rejections_total\{.*"queue_full"\} 3\.0$', text, re.M)
    assert "\npronk:requests_received_total 3.0\n" in text
    assert "\npronk:requests_rejected_total 3.0\n" in text


async def test_no_more_are_on_the_way_to_the_engine_than_it_has_room_for(
    engine: FakeEngine,
) -> None:
    """Those that are being read or tokenized count, though the engine has not heard of them."""
    engine.state = replace(FULL, room=2)
    slow = engine.state
    app = make_app(engine)
    held = asyncio.Event()
    submit = engine.submit

    def waiting(*arguments: Any, **rest: Any) -> Any:
        return _Held(submit(*arguments, **rest), held)

    engine.submit = waiting  # type: ignore[method-assign]
    async with talking_to(app) as client:
        body = {"prompt": "Hi"}
        first = [asyncio.create_task(client.post(URL, json=body)) for _ in range(2)]
        await until(lambda: app.state.server.gate.entering.total() == 2)
        assert (await client.post(URL, json=body)).status_code == 429
        held.set()
        assert [(await one).status_code for one in first] == [200, 200]
        assert app.state.server.gate.entering.total() == 0
        assert engine.state is slow
        assert (await client.post(URL, json=body)).status_code == 200


# ---- accounts


def gate_of(state: State, most_reading: int = 8) -> Gate:
    return Gate(ModelRegistry([served(FakeEngine(state=state))]), most_reading)


def arrive(gate: Gate, account: str, *, is_generation: bool = True) -> Exchange | None:
    """Lets a request in, or tells that it was refused."""
    exchange = Exchange("req", caller=Caller(account), is_generation=is_generation)
    try:
        gate.enter(exchange)
    except Overloaded:
        return None
    return exchange


def test_who_has_its_share_is_refused_and_who_has_less_is_let_in() -> None:
    gate = gate_of(State(stage="ready", room=0, refused={"flood": 9.5}))
    with pytest.raises(Overloaded) as refusal:
        gate.check("flood")
    assert refusal.value.retry_after == 9.5
    gate.check("victim")


def test_a_shut_engine_is_shut_for_everybody() -> None:
    gate = gate_of(State(stage="ready", room=0, refused={"flood": 9.5}, is_shut=True))
    assert arrive(gate, "flood") is None
    assert arrive(gate, "victim") is None


@pytest.mark.parametrize("room", [0, 6])
def test_one_account_on_its_way_shuts_nobody_else_out(room: int) -> None:
    gate = gate_of(State(stage="ready", room=room))
    while arrive(gate, "flood") is not None:
        assert gate.entering.total() <= 8
    assert arrive(gate, "flood") is None
    assert arrive(gate, "victim") is not None
    while arrive(gate, "victim") is not None:
        assert gate.entering.total() <= 2 * 8
    assert gate.entering["victim"] >= 2


def test_places_come_back_when_requests_leave_however_often_they_do() -> None:
    gate = gate_of(State(stage="ready", room=2))
    first, second = arrive(gate, "a"), arrive(gate, "a")
    assert first is not None
    assert second is not None
    assert arrive(gate, "a") is None
    gate.leave(first)
    gate.leave(first)
    assert gate.entering.total() == 1
    assert arrive(gate, "a") is not None
    assert arrive(gate, "a") is None


def test_a_flood_of_questions_is_bounded_and_takes_no_room_for_tokens() -> None:
    gate = gate_of(State(stage="ready", room=4))
    asked = [arrive(gate, "a", is_generation=False) for _ in range(20)]
    assert sum(one is not None for one in asked) == 8
    assert arrive(gate, "b", is_generation=False) is not None
    assert [arrive(gate, "a") is not None for _ in range(5)] == [True] * 4 + [False]
    for one in filter(None, asked):
        gate.leave(one)
    assert arrive(gate, "a", is_generation=False) is not None


class _Held:
    """A submission that the engine answers late."""

    def __init__(self, inner: Any, may_enter: asyncio.Event) -> None:
        self.inner, self.may_enter = inner, may_enter

    async def __aenter__(self) -> Any:
        await self.may_enter.wait()
        return await self.inner.__aenter__()

    async def __aexit__(self, *error: Any) -> None:
        await self.inner.__aexit__(*error)


async def test_whoever_only_promises_a_body_holds_no_place(engine: FakeEngine) -> None:
    engine.state = replace(FULL, room=1)
    app = make_app(engine)
    promises = [Uploader([b'{"prompt"', b': "Hi"}']) for _ in range(3)]
    tasks = [asyncio.create_task(promise.run(app)) for promise in promises]
    await until(lambda: all(promise.num_asked == 2 for promise in promises))
    async with talking_to(app) as client:
        assert (await client.post(URL, json={"prompt": "Hi"})).status_code == 200
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert app.state.server.gate.entering.total() == 0


@pytest.mark.parametrize("fields", [{"n": 0}, {"prompt": ""}, {"prompt": [999]}])
async def test_a_bad_request_gives_its_place_back(
    engine: FakeEngine, fields: dict[str, Any]
) -> None:
    app = make_app(engine)
    async with talking_to(app) as client:
        response = await client.post(URL, json={"prompt": "Hi"} | fields)
    assert response.status_code == 400
    assert app.state.server.gate.entering.total() == 0


# ---- bodies


async def test_bodies_together_have_a_bound_and_free_it_when_they_end(engine: FakeEngine) -> None:
    """Three bodies of 600 bytes, room for two: the third is told to come again, then it fits."""
    app = make_app(engine, max_body_memory=1500, max_body_bytes=1024)
    piece = b'{"prompt": "Hi"}'.ljust(600)
    uploads = [Uploader([piece[:500], piece[500:]]) for _ in range(3)]
    tasks = []
    for upload in uploads:
        tasks.append(asyncio.create_task(upload.run(app)))
        await until(lambda upload=upload: upload.num_asked == 2)
    for upload, task in zip(uploads, tasks, strict=True):
        upload.may_send.set()
        await task
    assert [upload.status for upload in uploads] == [429, 200, 200]
    headers = dict(uploads[0].messages[0]["headers"])
    assert int(headers[b"retry-after"]) >= 1
    assert b"bodies_full" in uploads[0].messages[1]["body"]
    later = Uploader([piece])
    await later.run(app)
    assert later.status == 200


async def test_a_body_counts_until_its_answer_has_ended(engine: FakeEngine) -> None:
    engine.gate = asyncio.Event()
    app = make_app(engine, max_body_memory=1024, max_body_bytes=1024)
    body = {"prompt": "Hi", "user": "x" * 600}
    async with talking_to(app) as client:
        running = asyncio.create_task(client.post(URL, json=body))
        await until(lambda: engine.live == 1)
        refused = await client.post(URL, json=body)
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "bodies_full"
        engine.gate.set()
        assert (await running).status_code == 200
        assert (await client.post(URL, json=body)).status_code == 200


async def test_one_key_s_bodies_shut_nobody_else_out(engine: FakeEngine) -> None:
    engine.gate = asyncio.Event()
    app = make_app(engine, max_body_memory=2048, max_body_bytes=1024, api_key=["a", "b"])
    body = {"prompt": "Hi", "user": "x" * 700}
    async with talking_to(app) as client:

        async def post(key: str) -> int:
            headers = {"x-api-key": key}
            return (await client.post(URL, json=body, headers=headers)).status_code

        running = [asyncio.create_task(post("a")) for _ in range(2)]
        await until(lambda: engine.live == 2)
        assert await post("a") == 429
        running.append(asyncio.create_task(post("b")))
        await until(lambda: engine.live == 3)
        assert await post("a") == 429
        engine.gate.set()
        assert [await one for one in running] == [200, 200, 200]
        assert await post("a") == 200


# ---- one request's product


@pytest.mark.parametrize(
    ("fields", "param", "share"),
    [
        ({"n": 8, "max_tokens": 150}, "max_tokens", 125),
        ({"n": 4, "max_tokens": 150, "prompt": ["a", "b", "c", "d"]}, "max_tokens", 62),
        ({"n": 2, "max_tokens": 150, "logprobs": 4}, "max_tokens", 100),
        ({"best_of": 20, "max_tokens": 60}, "max_tokens", 50),
        ({"prompt": [[65]] * 1001}, "max_tokens", None),
    ],
)
async def test_choices_times_tokens_are_bounded_and_the_refusal_says_what_fits(
    engine: FakeEngine, fields: dict[str, Any], param: str, share: int | None
) -> None:
    async with talking_to(make_app(engine, max_request_tokens=1000)) as client:
        error = await refuse(client, **fields)
        assert error["param"] == param
        assert "1000" in error["message"]
        assert engine.submitted == []
        if share is not None:
            assert f"at most {share}," in error["message"]
            fitting = {"prompt": "Hi", **fields, "max_tokens": share}
            assert (await client.post(URL, json=fitting)).status_code == 200


async def test_one_choice_may_have_the_whole_context(engine: FakeEngine) -> None:
    async with talking_to(make_app(engine, max_request_tokens=10)) as client:
        response = await client.post(URL, json={"prompt": "Hi", "max_tokens": 190, "logprobs": 5})
    assert response.status_code == 200, response.text


async def test_a_default_is_cut_to_what_fits(engine: FakeEngine) -> None:
    async with talking_to(make_app(engine, max_request_tokens=100)) as client:
        body: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "n": 10}
        assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
        assert (await client.post(URL, json={"prompt": "Hi", "n": 20})).status_code == 200
    told = [one.max_tokens for call in engine.submitted for one in call["settings"]]  # type: ignore[attr-defined]
    assert told == [10] * 10 + [5] * 20


async def test_log_probabilities_of_many_prompts_are_bounded(engine: FakeEngine) -> None:
    async with talking_to(make_app(engine, max_request_tokens=1000)) as client:
        many = {"prompt": ["x" * 40] * 5, "max_tokens": 1}
        error = await refuse(client, **many, prompt_logprobs=5)
        assert error["param"] == "prompt"
        one = {"prompt": "x" * 180, "max_tokens": 1, "prompt_logprobs": 20}
        assert (await client.post(URL, json=one)).status_code == 200
        assert (await client.post(URL, json=many)).status_code == 200
