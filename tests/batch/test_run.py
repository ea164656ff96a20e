"""A batch against a fake engine over sockets, and a whole ``pronk batch`` killed in the middle."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from service.api.app import create_app
from service.batch import run
from service.batch.problem import BatchProblem
from service.batch.run import BatchSettings, Summary, run_batch
from service.errors import EngineFailure, LimitReached, Overloaded, QuotaSpent
from service.registry import ModelRegistry
from service.settings import Settings
from tests.api.fakes import FakeEngine, served
from tests.api.live import listening

ROOT = Path(__file__).resolve().parents[2]


def line(number: int, **fields: Any) -> dict[str, Any]:
    body = {"model": "tiny", "prompt": f"Line {number}"}
    return {
        "custom_id": f"id-{number}",
        "method": "POST",
        "url": "/v1/completions",
        "body": body,
    } | fields


def write_input(path: Path, lines: list[dict[str, Any] | str]) -> Path:
    texts = [text if isinstance(text, str) else json.dumps(text) for text in lines]
    path.write_text("\n".join(texts) + "\n")
    return path


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text().splitlines()]


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def url(engine: FakeEngine) -> Iterator[str]:
    app = create_app(Settings(api_key=["key"]), ModelRegistry([served(engine)]))
    with listening(app) as found:
        yield found


def batch(tmp_path: Path, url: str, **fields: Any) -> Summary:
    options = {"api_key": "key", "concurrency": 4} | fields
    return run_batch(
        BatchSettings(tmp_path / "in", tmp_path / "out", Settings(), url=url, **options)
    )


def test_every_line_gets_one_record_of_openai_s_shape(tmp_path: Path, url: str) -> None:
    chat = {"messages": [{"role": "user", "content": "Hi"}]}
    write_input(
        tmp_path / "in",
        [
            *map(line, range(20)),
            line(20, url="/v1/chat/completions", body=chat),
            line(21, body={"prompt": "Hi", "temperature": 9}),
            "not json",
            line(3),
            line(23, url="/v1/files"),
        ],
    )
    summary = batch(tmp_path, f"{url}/v1")
    assert (summary.num_answered, summary.num_refused, summary.code) == (21, 4, 3)
    assert summary.completion_tokens == 21 * 13
    found = records(tmp_path / "out")
    assert len({record["id"] for record in found}) == 25
    by_id = {record["custom_id"]: record for record in found if record["error"] is None}
    assert set(by_id) == {f"id-{number}" for number in range(22)}
    answer = by_id["id-5"]["response"]
    assert (answer["status_code"], bool(answer["request_id"])) == (200, True)
    assert answer["body"]["choices"][0]["text"] == "Hello, world"
    assert by_id["id-20"]["response"]["body"]["object"] == "chat.completion"
    refused = by_id["id-21"]["response"]
    assert (refused["status_code"], refused["body"]["error"]["param"]) == (400, "temperature")
    errors = {record["error"]["line"]: record for record in found if record["error"]}
    assert {number: record["error"]["code"] for number, record in errors.items()} == {
        23: "invalid_json",
        24: "duplicate_custom_id",
        25: "invalid_url",
    }
    assert all(record["response"] is None for record in errors.values())


def test_a_second_run_sends_only_what_is_missing(
    tmp_path: Path, url: str, engine: FakeEngine
) -> None:
    write_input(tmp_path / "in", [*map(line, range(10)), "bad", line(2)])
    batch(tmp_path, url)
    kept = (tmp_path / "out").read_bytes().splitlines(keepends=True)
    (tmp_path / "out").write_bytes(b"".join(kept[:5]) + kept[5][:30])
    engine.submitted.clear()
    summary = batch(tmp_path, url)
    gone = Counter(json.loads(text)["custom_id"] for text in kept[5:])
    assert summary.num_before == 5
    assert summary.num_done == len(kept) - 5
    again = Counter(record["custom_id"] for record in records(tmp_path / "out")[5:])
    assert again == gone
    assert batch(tmp_path, url).num_done == 0


def test_a_full_queue_is_waited_for(tmp_path: Path, url: str, engine: FakeEngine) -> None:
    engine.refusals = {number: Overloaded("full", retry_after=0.1) for number in range(4)}
    write_input(tmp_path / "in", [*map(line, range(6))])
    assert batch(tmp_path, url).num_answered == 6


def test_what_a_key_s_limits_never_let_in_is_a_failed_line(
    tmp_path: Path, url: str, engine: FakeEngine
) -> None:
    engine.refusals = {0: LimitReached("more than a minute has", limit="tokens")}
    write_input(tmp_path / "in", [line(1), line(2)])
    summary = batch(tmp_path, url, concurrency=1)
    assert (summary.num_answered, summary.num_refused) == (1, 1)
    assert [record["response"]["status_code"] for record in records(tmp_path / "out")] == [429, 200]


def test_a_spent_quota_ends_the_run_at_once_and_uses_no_line_up(
    tmp_path: Path, url: str, engine: FakeEngine
) -> None:
    engine.refusals = {0: QuotaSpent("Spent.", limit="tokens-day", retry_after=40_000)}
    write_input(tmp_path / "in", [line(1)])
    with pytest.raises(BatchProblem, match=r"Spent\. Run it again"):
        batch(tmp_path, url)
    assert records(tmp_path / "out") == []


def test_an_engine_that_fails_on_a_line_is_asked_three_times(
    tmp_path: Path, url: str, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.refusals = {number: EngineFailure("it broke") for number in (0, 1, 2)}
    write_input(tmp_path / "in", [line(1), line(2)])
    summary = batch(tmp_path, url, concurrency=1)
    assert (summary.num_answered, summary.num_refused) == (1, 1)
    assert len(engine.submitted) == 4
    engine.refusals = {}
    assert batch(tmp_path, url).num_done == 0
    assert batch(tmp_path, url, retry_failed=True).num_answered == 1
    assert all(record["response"]["status_code"] == 200 for record in records(tmp_path / "out"))


def test_a_server_that_is_gone_ends_the_run_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "PATIENCE", 0.5)
    write_input(tmp_path / "in", [line(1)])
    with pytest.raises(BatchProblem, match="no server answers"):
        batch(tmp_path, "http://127.0.0.1:9")
    assert (tmp_path / "out").read_bytes() == b""


async def answer_oddly(request: Request) -> Response:
    """Another server's ways: pretty JSON, a page of HTML, a failure that passes."""
    prompt = (await request.json())["prompt"]
    if prompt == "Line 1":
        return Response('{\n  "id": 1,\n  "usage": "none"\n}', media_type="application/json")
    if prompt == "Line 2":
        return Response("<html>", 403)
    request.app.state.count += 1
    return JSONResponse({"ok": True}, 502 if request.app.state.count == 1 else 200)


def test_any_server_s_answers_fit_on_a_line(tmp_path: Path) -> None:
    app = FastAPI()
    app.state.count = 0
    app.add_api_route("/v1/completions", answer_oddly, methods=["POST"])
    write_input(tmp_path / "in", [line(1), line(2), line(3)])
    with listening(app) as url:
        assert batch(tmp_path, url).num_answered == 2
    by_id = {record["custom_id"]: record for record in records(tmp_path / "out")}
    assert by_id["id-1"]["response"]["body"] == {"id": 1, "usage": "none"}
    assert by_id["id-2"]["error"]["code"] == "invalid_answer"
    assert by_id["id-3"]["response"]["body"] == {"ok": True}


def test_lines_that_failed_before_still_count(tmp_path: Path, url: str) -> None:
    write_input(tmp_path / "in", [line(1), line(2, body={"prompt": "Hi", "temperature": 9})])
    assert batch(tmp_path, url).code == 3
    again = batch(tmp_path, url)
    assert (again.num_done, again.code) == (0, 3)
    assert "--retry-failed" in again.text()


def test_a_wrong_key_ends_the_run_and_uses_no_line_up(tmp_path: Path, url: str) -> None:
    write_input(tmp_path / "in", [line(1)])
    with pytest.raises(BatchProblem, match="key"):
        batch(tmp_path, url, api_key="wrong")
    assert (tmp_path / "out").read_bytes() == b""


def test_a_full_queue_is_waited_for_in_anthropic_s_words_too(
    tmp_path: Path, url: str, engine: FakeEngine
) -> None:
    engine.refusals = {0: Overloaded("full", retry_after=0.1)}
    body = {"max_tokens": 9, "messages": [{"role": "user", "content": "Hi"}]}
    write_input(tmp_path / "in", [line(1, url="/v1/messages", body=body)])
    assert batch(tmp_path, url).num_answered == 1


# ---- the command


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "service.cli", "batch", *map(str, arguments)]


def test_a_run_killed_in_the_middle_is_gone_on_with(tmp_path: Path) -> None:
    """The bundled model, without a socket: half is answered, SIGKILL, the rest."""
    source, target = tmp_path / "in.jsonl", tmp_path / "in.output.jsonl"
    body = {"prompt": "Once upon a time", "max_tokens": 40, "seed": 1}
    write_input(source, [line(number, body=body) for number in range(60)])
    options = ("--max-num-seqs", "4", "--max-model-len", "128")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command(source, *options), env=environment, stderr=subprocess.DEVNULL, cwd=tmp_path
    )
    end = time.monotonic() + 90
    while not (target.exists() and target.read_bytes().count(b"\n") >= 3):
        assert process.poll() is None, "it ended too soon"
        assert time.monotonic() < end
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = target.read_bytes()
    assert 3 <= kept.count(b"\n") < 60, "killed too late to show anything"
    with target.open("ab") as file:
        file.write(b'{"id":"batch_req_12')  # a write that was cut
    second = subprocess.run(
        command(source, *options),
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert second.returncode == 0, second.stderr
    assert f"{len(kept.splitlines())} done before" in second.stderr
    assert target.read_bytes().startswith(kept)
    found = records(target)
    assert Counter(record["custom_id"] for record in found) == Counter(
        f"id-{number}" for number in range(60)
    )
    texts = {record["response"]["body"]["choices"][0]["text"] for record in found}
    assert len(texts) == 1, "the same request and seed, the same text"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("missing.jsonl",), "cannot read"),
        (("in", "--url", "http://x", "--dtype", "float32"), "not both"),
        (("in", "--no-such-setting", "1"), "no-such-setting"),
        (("in", "--model", "no/such/model"), "no model at"),
        (("in", "-o", "in"), "the output is the input"),
    ],
)
def test_what_cannot_run_is_one_clear_line(
    tmp_path: Path, arguments: tuple[str, ...], says: str
) -> None:
    write_input(tmp_path / "in", [line(1)])
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        command(*arguments),
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode in (1, 2)
    assert says in ended.stderr
    assert "Traceback" not in ended.stderr
