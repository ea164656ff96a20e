"""Which request a log line is about, and the line each request may leave."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from service.errors import Overloaded
from service.log_context import AboutRequest, logging_about
from service.logs import JsonFormatter
from tests.api.conftest import Reader, scope_of, talking_to, until
from tests.api.fakes import FakeEngine

URL = "/v1/completions"
CANARY = "zanzibarine"


class Lines(logging.Handler):
    """As the server's own handler writes them."""

    def __init__(self) -> None:
        super().__init__()
        self.addFilter(AboutRequest())
        self.setFormatter(JsonFormatter())
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(self.format(record))

    def of(self, name: str) -> list[dict[str, Any]]:
        lines = [json.loads(text) for text in self.texts]
        return [line for line in lines if line["logger"] == name]


@pytest.fixture
def lines() -> Iterator[Lines]:
    handler, root = Lines(), logging.getLogger("pronk")
    level = root.level
    root.addHandler(handler)
    root.setLevel("INFO")
    yield handler
    root.removeHandler(handler)
    root.setLevel(level)


async def test_a_finished_request_leaves_one_line_with_its_numbers(
    make_app: Callable[..., FastAPI], lines: Lines
) -> None:
    async with talking_to(make_app(access_log=True)) as client:
        body = {"prompt": CANARY, "stop": "quux", "user": CANARY}
        await client.post(URL, json=body, headers={"x-request-id": "one"})
        await client.get("/v1/models", headers={"x-request-id": "two"})
        for path in ("/livez", "/readyz", "/v2/health/ready"):
            await client.get(path)
    first, second = lines.of("pronk.access")
    seconds = [first.pop(f"{name}seconds") for name in ("", "queue_", "prefill_", "decode_")]
    assert min(seconds) >= 0
    del first["time"]
    assert first == {
        "level": "info",
        "logger": "pronk.access",
        "message": "POST /v1/completions 200",
        "request_id": "one",
        "method": "POST",
        "route": URL,
        "status": 200,
        "outcome": "finished",
        "model": "tiny",
        "finish": "stop",
        "prompt_tokens": 12,
        "cached_tokens": 0,
        "generated_tokens": 13,
    }
    assert (second["request_id"], second["route"]) == ("two", "/v1/models")
    assert "prompt_tokens" not in second
    assert CANARY not in "".join(lines.texts)
    assert "Hello" not in "".join(lines.texts)


async def test_refusals_failures_and_hangups_leave_a_line_too(
    make_app: Callable[..., FastAPI], engine: FakeEngine, lines: Lines
) -> None:
    app = make_app(access_log=True)
    async with talking_to(app) as client:
        await client.post(URL, json={"prompt": ""})
        engine.refusal = Overloaded("full", retry_after=1)
        await client.post(URL, json={"prompt": "x"})
        engine.refusal, engine.fail_after = None, 1
        await client.post(URL, json={"prompt": "x", "stream": True})
        await client.get(f"/{'x' * 500}")
    engine.fail_after, engine.gate = None, asyncio.Event()
    reader = Reader({"prompt": "x"})
    task = asyncio.create_task(app(scope_of(URL), reader.receive, reader.send))
    await until(lambda: engine.live > 0)
    reader.gone.set()
    await task
    told = [
        (one.get("status"), one["outcome"], one.get("code")) for one in lines.of("pronk.access")
    ]
    assert told == [
        (400, "rejected", None),
        (429, "rejected", "queue_full"),
        (200, "failed", "engine_failure"),
        (404, "rejected", None),
        (None, "cancelled", None),
    ]
    assert "xxx" not in "".join(lines.texts)


async def test_the_key_is_told_by_its_name(make_app: Callable[..., FastAPI], lines: Lines) -> None:
    async with talking_to(make_app(access_log=True, api_key=[CANARY])) as client:
        headers = {"Authorization": f"Bearer {CANARY}"}
        await client.post(URL, json={"prompt": "x"}, headers=headers)
        await client.post(URL, json={"prompt": "x"})
    known, stranger = lines.of("pronk.access")
    assert known["key"] == "(api-key)"
    assert "key" not in stranger
    assert CANARY not in "".join(lines.texts)


async def test_without_the_flag_there_is_no_line(
    make_app: Callable[..., FastAPI], lines: Lines
) -> None:
    async with talking_to(make_app()) as client:
        await client.post(URL, json={"prompt": "x"})
    assert lines.texts == []


async def test_every_line_of_a_request_carries_its_id_and_no_other_line_does(
    make_app: Callable[..., FastAPI], engine: FakeEngine, lines: Lines
) -> None:
    deep = logging.getLogger("pronk.deep")

    def script(prompt: list[int], settings: object) -> list[int]:
        deep.info("in the middle of it")
        return list(b"ok")

    engine.script = script
    async with talking_to(make_app()) as client:
        ask = [
            client.post(URL, json={"prompt": "x", "max_tokens": 2}, headers={"x-request-id": name})
            for name in ("one", "two", "three")
        ]
        await asyncio.gather(*ask)
    deep.info("of nobody")
    ids = [line.get("request_id") for line in lines.of("pronk.deep")]
    assert sorted(ids[:-1]) == ["one", "three", "two"]
    assert ids[-1] is None


async def test_tasks_and_threads_of_a_request_are_about_it_too(lines: Lines) -> None:
    def say() -> None:
        logging.getLogger("pronk.deep").info("hello")

    async def task() -> None:
        say()

    with logging_about("r", "t"):
        await asyncio.gather(asyncio.create_task(task()), asyncio.to_thread(say))
        logging.getLogger("pronk.deep").info("of another", extra={"request_id": "other"})
    *own, other = lines.of("pronk.deep")
    assert [(one["request_id"], one["trace_id"]) for one in own] == [("r", "t")] * 2
    assert other["request_id"] == "other"
    assert "trace_id" not in other


def test_the_servers_own_handler_adds_them(tmp_path: Path) -> None:
    import subprocess
    import sys

    code = (
        "import logging; from service.logs import configure_logging\n"
        "from service.log_context import logging_about\n"
        "configure_logging('info', 'json')\n"
        "with logging_about('abc', 'def'): logging.getLogger('pronk.x').warning('hi')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    line = json.loads(done.stderr)
    assert (line["request_id"], line["trace_id"]) == ("abc", "def")
