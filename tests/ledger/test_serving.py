"""A real server and its ledger: killed, started again, ended at once."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from model.bundled import bundled_model_path
from service.ledger.report import Range, records
from tests.ledger.samples import select
from tests.running import ROOT, Running, serving, wait_until

ARGUMENTS = ["--no-sample", "--threads", "1", "--num-kv-blocks", "700", "--block-size", "32"]
TOLD = {"prompt": "Once upon a time", "max_tokens": 5}
ENDLESS = {"prompt": "Once", "stream": True, "ignore_eos": True, "max_tokens": 900, "n": 24}


def ask(server: Running, name: str) -> dict[str, int]:
    headers = {"x-request-id": name}
    answer = httpx.post(f"{server.url}/v1/completions", json=TOLD, headers=headers, timeout=60)
    assert answer.status_code == 200
    return dict(answer.json()["usage"])


class Stream(threading.Thread):
    """Reads until the server is gone; made once its first line has come."""

    def __init__(self, server: Running, name: str) -> None:
        super().__init__(daemon=True)
        self.url, self.headers = f"{server.url}/v1/completions", {"x-request-id": name}
        self.began = threading.Event()
        self.start()
        assert self.began.wait(60)

    def run(self) -> None:
        try:
            with httpx.stream(
                "POST", self.url, json=ENDLESS, headers=self.headers, timeout=60
            ) as answer:
                for _ in answer.iter_lines():
                    self.began.set()
        except httpx.HTTPError:
            pass


@pytest.mark.skipif(
    not (bundled_model_path() / "model.safetensors").is_file(), reason="no bundled weights here"
)
def test_a_killed_server_leaves_whole_books_and_the_next_one_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "usage.db"
    with serving(*ARGUMENTS, PRONK_LEDGER=str(path)) as server:
        usage = [ask(server, f"first-{number}") for number in range(5)]
        wait_until(lambda: len(list(records(path, Range()))) == 5, "records", server)
        stream = Stream(server, "cut")
        server.end(signal.SIGKILL)
        stream.join(30)
    assert select(path, "PRAGMA integrity_check") == [("ok",)]
    found = list(records(path, Range()))
    assert [record.request_id for record in found] == [f"first-{number}" for number in range(5)]
    assert [record.generated_tokens for record in found] == [
        told["completion_tokens"] for told in usage
    ]

    with serving(*ARGUMENTS, PRONK_LEDGER=str(path)) as server:
        ask(server, "second")
        stream = Stream(server, "interrupted")
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)  # a second one at once would be an echo of the first
        assert server.end(signal.SIGTERM) == 128 + signal.SIGTERM, "at once: nothing is awaited"
        stream.join(30)
    second, last = list(records(path, Range()))[5:]
    assert (second.request_id, second.finish) == ("second", "length")
    assert last.request_id == "interrupted"
    assert last.finish in ("error", "cancelled")
    assert 0 < last.generated_tokens + last.discarded_tokens == last.engine_generated_tokens
    command = [sys.executable, "-m", "service.cli", "usage", "--ledger", str(path)]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "(no key)" in shown


def test_a_server_does_not_start_over_another_programs_file(tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("mine")
    command = [sys.executable, "-m", "service.cli", "serve", "--ledger", str(notes), "--port", "0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"cannot keep the usage ledger {notes}: it is no SQLite file" in done.stderr
    assert "Traceback" not in done.stderr
    assert notes.read_text() == "mine"
