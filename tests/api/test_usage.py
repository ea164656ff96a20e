"""One record for each request, answered or refused, with what it cost; and never its text."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client import CollectorRegistry, generate_latest

from service.api.app import create_app
from service.errors import Overloaded
from service.ledger.ledger import Ledger
from service.ledger.record import Record
from service.ledger.report import Range, records
from service.ledger.store import Store
from service.registry import ModelRegistry
from service.settings import Settings
from service.usage_metrics import UsageMetrics
from tests.api.conftest import Reader, scope_of, talking_to, until
from tests.api.fakes import FakeEngine, say, served

COMPLETIONS = "/v1/completions"
CANARY = "zanzibarine"


class Book:
    """A ledger in a file of its own; ``read`` closes it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.ledger = Ledger(Store(path), interval=0.01)

    def read(self) -> list[Record]:
        self.ledger.close()
        return list(records(self.path, Range()))


@pytest.fixture
def book(tmp_path: Path) -> Iterator[Book]:
    found = Book(tmp_path / "usage.db")
    yield found
    found.ledger.close()


@pytest.fixture
def make(engine: FakeEngine, book: Book) -> Callable[..., FastAPI]:
    def make(**settings: Any) -> FastAPI:
        model = served(engine)
        model.max_model_len = 2_000  # tokens of one byte each
        return create_app(Settings(**settings), ModelRegistry([model]), book.ledger)

    return make


@pytest.fixture
async def http(make: Callable[..., FastAPI]) -> Any:
    async with talking_to(make()) as client:
        yield client


async def test_a_whole_answer_is_recorded_as_its_usage_says(
    http: httpx.AsyncClient, book: Book, engine: FakeEngine
) -> None:
    engine.cached = 2
    headers = {"x-request-id": "mine"}
    answer = await http.post(COMPLETIONS, json={"prompt": "Hello", "n": 2}, headers=headers)
    usage = answer.json()["usage"]
    [record] = book.read()
    assert (record.request_id, record.route, record.model) == ("mine", COMPLETIONS, "tiny")
    assert (record.status, record.finish, record.num_choices) == (200, "stop", 2)
    assert record.prompt_tokens == usage["prompt_tokens"]
    assert record.generated_tokens == usage["completion_tokens"]
    assert (record.cached_tokens, record.discarded_tokens) == (2, 0)
    assert record.energy_joules is None
    assert record.total_seconds > 0


async def test_a_stream_without_usage_is_counted_too(http: httpx.AsyncClient, book: Book) -> None:
    await http.post(COMPLETIONS, json={"prompt": "Hello", "stream": True, "max_tokens": 3})
    [record] = book.read()
    assert (record.generated_tokens, record.finish) == (3, "length")


async def test_tokens_past_a_stop_string_are_discarded(
    http: httpx.AsyncClient, book: Book, engine: FakeEngine
) -> None:
    engine.group = 4
    await http.post(COMPLETIONS, json={"prompt": "Hi", "stop": ["Hello"]})
    [record] = book.read()
    assert (record.generated_tokens, record.discarded_tokens) == (5, 3)


@pytest.mark.parametrize("stream", [True, False])
async def test_who_hangs_up_is_recorded_with_what_was_drawn_for_it(
    make: Callable[..., FastAPI], book: Book, engine: FakeEngine, stream: bool
) -> None:
    engine.pause = 0.01
    engine.script = lambda prompt, settings: say("x" * 150)
    reader = Reader({"prompt": "Hi", "max_tokens": 100, "stream": stream})
    reader.may_read.set()
    call = asyncio.create_task(make()(scope_of(COMPLETIONS), reader.receive, reader.send))
    await until(lambda: engine.generations and engine.generations[0].given >= 5)
    reader.gone.set()
    await call
    [record] = book.read()
    assert record.finish == "cancelled"
    assert record.prompt_tokens == 3
    assert 5 <= record.engine_generated_tokens < 100
    assert record.generated_tokens + record.discarded_tokens == record.engine_generated_tokens
    if stream:
        frames = reader.text.count("data: ")
        assert frames == record.generated_tokens, "one token a frame"
    else:
        assert record.generated_tokens == 0, "nothing was told"


async def test_an_engine_that_fails_in_a_stream_is_an_error_with_its_code(
    http: httpx.AsyncClient, book: Book, engine: FakeEngine
) -> None:
    engine.fail_after = 3
    answer = await http.post(COMPLETIONS, json={"prompt": "Hi", "stream": True})
    assert answer.status_code == 200
    answer = await http.post(COMPLETIONS, json={"prompt": "Hi"})
    assert answer.status_code == 500
    streamed, whole = book.read()
    assert (streamed.status, streamed.finish, streamed.code) == (200, "error", "engine_failure")
    assert (streamed.generated_tokens, streamed.discarded_tokens) == (3, 0)
    assert (whole.status, whole.finish, whole.code) == (500, "error", "engine_failure")
    assert (whole.generated_tokens, whole.discarded_tokens) == (0, 3)


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"prompt": "Hi"}, 429, "queue_full"),
        ({"prompt": "Hi", "model": f"{CANARY}"}, 404, "model_not_found"),
        ({"prompt": 7.5}, 400, ""),
        ({"prompt": "a" * 3_000}, 400, "context_length_exceeded"),
    ],
)
async def test_refusals_are_recorded_without_a_token(
    http: httpx.AsyncClient,
    book: Book,
    engine: FakeEngine,
    body: dict[str, Any],
    status: int,
    code: str,
) -> None:
    engine.refusal = Overloaded("full", retry_after=3)
    assert (await http.post(COMPLETIONS, json=body)).status_code == status
    [record] = book.read()
    assert (record.status, record.finish, record.code) == (status, "rejected", code)
    assert record.engine_prompt_tokens == record.engine_generated_tokens == 0
    assert CANARY not in str(record), "a client's word for a model is its own"


async def test_every_kind_of_question_is_recorded_once(
    http: httpx.AsyncClient, book: Book, engine: FakeEngine
) -> None:
    engine.pooled = None
    asked = [
        (COMPLETIONS, {"prompt": ["a", "bc"], "max_tokens": 2}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}),
        ("/v1/responses", {"input": "Hi"}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 30}),
        ("/v1/score", {"text_1": "a", "text_2": ["b", "c"]}),
        ("/v1/estimate", {"prompt": "Hi"}),
    ]
    for path, body in asked:
        answer = await http.post(path, json=body)
        assert answer.status_code == 200, answer.text
    for path in ("/livez", "/metrics", "/v1/models"):
        await http.get(path)
    await http.post("/tokenize", json={"prompt": "Hi"})
    found = book.read()
    assert [record.route for record in found] == [path for path, _ in asked]
    assert [record.finish for record in found[1:4]] == ["stop"] * 3
    assert found[-1].engine_prompt_tokens == 0, "an estimate computes nothing"
    assert found[0].prompt_tokens == 5
    assert (found[0].num_choices, found[4].num_choices) == (2, 2)


async def test_choices_that_end_differently_are_both_told(
    http: httpx.AsyncClient, book: Book, engine: FakeEngine
) -> None:
    engine.script = lambda prompt, settings: say("x" * (2 if settings.choice else 50))
    await http.post(COMPLETIONS, json={"prompt": "Hi", "n": 2, "max_tokens": 10})
    [record] = book.read()
    assert record.finish == "length+stop"


@pytest.mark.parametrize("stream", [True, False])
async def test_calls_and_reasoning_are_told_apart(
    make: Callable[..., FastAPI], book: Book, engine: FakeEngine, stream: bool
) -> None:
    text = '<think>hm</think><tool_call>{"name": "f", "arguments": {}}</tool_call>'
    engine.script = lambda prompt, settings: say(text)
    body = {
        "messages": [{"role": "user", "content": "Hi"}],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
        "stream": stream,
    }
    app = make(reasoning_parser="think", tool_call_parser="hermes")
    async with talking_to(app) as client:
        assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
    [record] = book.read()
    assert record.finish == "tool_calls"
    assert record.reasoning_tokens == len("<think>hm</think>")


async def test_a_key_is_known_by_its_digest_and_no_text_is_kept(
    make: Callable[..., FastAPI], book: Book, engine: FakeEngine
) -> None:
    engine.script = lambda prompt, settings: say(f"it is {CANARY}")
    headers = {"authorization": "Bearer sk-zanzibar-key"}
    async with talking_to(make(api_key=["sk-zanzibar-key"])) as client:
        body = {"prompt": CANARY, "user": CANARY, "max_tokens": 30}
        answer = await client.post(COMPLETIONS, json=body, headers=headers)
        assert CANARY in answer.text
        refused = await client.post(COMPLETIONS, json=body)
        assert refused.status_code == 401
        metrics = (await client.get("/metrics", headers=headers)).text
    [record] = book.read()  # strangers are nobody's usage
    assert len(record.key_id) == 16
    for file in book.path.parent.iterdir():
        assert b"zanzibar" not in file.read_bytes()
    assert "zanzibar" not in metrics


async def test_metrics_tell_usage_by_key_and_how_the_ledger_fares(
    http: httpx.AsyncClient, book: Book
) -> None:
    for _ in range(3):
        await http.post(COMPLETIONS, json={"prompt": "Hello", "max_tokens": 4})
    await http.post(COMPLETIONS, json={"prompt": 1.5})
    await until(lambda: book.ledger.num_unwritten == 0)
    lines = (await http.get("/metrics")).text.splitlines()
    assert 'pronk:key_generation_tokens_total{key="none"} 12.0' in lines
    assert 'pronk:key_prompt_tokens_total{key="none"} 18.0' in lines
    assert 'pronk:key_requests_total{key="none",outcome="finished"} 3.0' in lines
    assert 'pronk:key_requests_total{key="none",outcome="rejected"} 1.0' in lines
    assert "pronk:ledger_records_total 4.0" in lines
    assert "pronk:ledger_dropped_total 0.0" in lines
    assert "pronk:ledger_writable 1.0" in lines


def test_names_past_the_bound_share_one_label() -> None:
    registry = CollectorRegistry()
    metrics = UsageMetrics(registry, max_names=3)
    for number in range(10):
        metrics.note(Record(0, "r", key_name=f"k{number}", generated_tokens=2), "finished")
    metrics.note(Record(0, "r", key_name="k0", generated_tokens=2), "finished")
    text = generate_latest(registry).decode()
    assert text.count("pronk:key_generation_tokens_total{") == 4
    assert 'pronk:key_generation_tokens_total{key="other"} 14.0' in text
    assert 'pronk:key_generation_tokens_total{key="k0"} 4.0' in text


@contextmanager
def disk_is_full(ledger: Ledger) -> Iterator[None]:
    connection = ledger._store._connection
    [pages] = connection.execute("PRAGMA page_count").fetchone()
    connection.execute(f"PRAGMA max_page_count = {pages}")
    yield


async def test_answers_go_on_while_nothing_can_be_written(
    http: httpx.AsyncClient, book: Book
) -> None:
    with disk_is_full(book.ledger):
        for _ in range(40):
            answer = await http.post(COMPLETIONS, json={"prompt": "Hi"})
            assert json.loads(answer.text)["usage"]["completion_tokens"] > 0
        await until(lambda: book.ledger.trouble)
        assert "pronk:ledger_writable 0.0" in (await http.get("/metrics")).text.splitlines()
