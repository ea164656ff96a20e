"""Clocks that jump: only timestamps follow the wall clock, whatever is waited for does not."""

from __future__ import annotations

import ast
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.running import ROOT, Running, serving
from tests.storm import engines_of

WALL = {"time.time", "time.time_ns", "datetime.now", "datetime.utcnow", "time.localtime"}
WALL |= {"time.gmtime", "datetime.today", "date.today", "time.ctime"}
TIMESTAMPS = {  # where the wall clock is read, and what for
    "service/api/completions.py": "created",
    "service/api/chat.py": "created",
    "service/api/response_shape.py": "created_at, completed_at",
    "service/api/scores.py": "created",
    "service/registry.py": "created of the model's card",
    "service/logs.py": "the time of a line",
    "service/keys/cli.py": "when keys were made and expire",
    "service/keys/keyring.py": "whether a key has expired, which is a date",
    "service/keys/limits.py": "the day and month that a quota is for",
    "service/api/rate_limits.py": "when a limit that stands in headers is over, as a date",
    "service/api/exchange.py": "when a request came, as traces tell it",
    "service/top/watch.py": "the time above a view",
    "service/api/recorder.py": "when a request ended",
    "service/ledger/cli.py": "since when to report",
    "service/ledger/report.py": "the day of a record",
    "service/ledger/show.py": "the time of a record",
    "service/ledger/store.py": "how many days records are kept; the name of a damaged file",
    "service/bench/report.py": "the date of a report",
    "model/template_sandbox.py": "strftime_now of chat templates",
}
JUMPS = """
import os, time
_time, _path = time.time, os.environ["JUMP"]
def jumping():
    with open(_path) as file:
        return _time() + float(file.read() or 0)
time.time = jumping
time.time_ns = lambda: int(jumping() * 1e9)
open(f"{_path}.{os.getpid()}", "w").close()
"""
YEARS = 365 * 86400 * 10.0


def wall_clock_readers() -> Iterator[str]:
    for path in sorted([*(ROOT / "service").rglob("*.py"), *(ROOT / "model").rglob("*.py")]):
        called = (node for node in ast.walk(ast.parse(path.read_text())))
        names = {ast.unparse(node) for node in called if isinstance(node, ast.Attribute)}
        if names & WALL:
            yield str(path.relative_to(ROOT))


def test_the_wall_clock_is_read_for_timestamps_alone() -> None:
    """A new reader belongs on the list only if nothing is waited for by it."""
    assert set(wall_clock_readers()) == set(TIMESTAMPS)


@pytest.fixture(scope="module")
def jump(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seconds that the wall clock of both processes is off by; written to, it jumps."""
    folder = tmp_path_factory.mktemp("clock")
    (folder / "sitecustomize.py").write_text(JUMPS)
    path = folder / "jump"
    path.write_text("0")
    return path


@pytest.fixture(scope="module")
def server(jump: Path) -> Iterator[Running]:
    environment = {"JUMP": str(jump), "PYTHONPATH": f"{jump.parent}:{ROOT}"}
    with serving("--no-sample", **environment) as running:
        yield running


def stream(server: Running, body: dict[str, object], chunks: list[dict[str, object]]) -> None:
    url = f"{server.url}/v1/completions"
    body = {"prompt": "A long story", "stream": True, "ignore_eos": True, **body}
    with httpx.stream("POST", url, json=body, timeout=30) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                chunks.append(json.loads(line[6:]))
        assert line == "" or line == "data: [DONE]"


def test_both_processes_live_by_the_clock_that_jumps(server: Running, jump: Path) -> None:
    process = psutil.Process(server.process.pid)
    (engine,) = engines_of(process)
    for one in (process, engine):
        assert jump.with_name(f"jump.{one.pid}").exists()


@pytest.mark.parametrize("seconds", [YEARS, -YEARS])
def test_a_jump_amid_a_stream_changes_nothing_but_the_timestamps(
    server: Running, jump: Path, seconds: float
) -> None:
    """Neither process restarts, times out, stalls or falls silent: the whole answer comes."""
    jump.write_text("0")
    chunks: list[dict[str, object]] = []
    body: dict[str, object] = {"max_tokens": 200, "deadline_ms": 60_000}
    reading = threading.Thread(target=stream, args=(server, body, chunks))
    reading.start()
    while len(chunks) < 20 and reading.is_alive():
        time.sleep(0.002)
    jump.write_text(str(seconds))
    reading.join(40)
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"  # type: ignore[index]
    assert len({chunk["created"] for chunk in chunks}) == 1, "one answer has one birthday"
    answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": "Hi", "max_tokens": 2})
    assert abs(answer.json()["created"] - (time.time() + seconds)) < 60
    assert isinstance(answer.json()["created"], int)
    assert httpx.get(f"{server.url}/readyz").status_code == 200
    assert "pronk:engine_restarts_total{" in (text := httpx.get(f"{server.url}/metrics").text)
    assert all(
        line.endswith(" 0.0")
        for line in text.splitlines()
        if line.startswith("pronk:engine_restarts_total{")
    )


def test_deadlines_and_kept_connections_outlive_a_jump(server: Running, jump: Path) -> None:
    jump.write_text("0")
    with httpx.Client(base_url=server.url) as client:
        assert client.get("/livez").status_code == 200
        pool = client._transport._pool  # type: ignore[attr-defined]
        (connection,) = pool.connections
        jump.write_text(str(YEARS))
        time.sleep(0.3)
        assert client.get("/livez").status_code == 200
        assert pool.connections == [connection], "it was closed, and another one opened"
        body = {"prompt": "A long story", "max_tokens": 900, "ignore_eos": True}
        answer = client.post("/v1/completions", json=body | {"deadline_ms": 200}, timeout=30)
    choice = answer.json()["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("length", "deadline")
    assert answer.json()["usage"]["completion_tokens"] < 900
