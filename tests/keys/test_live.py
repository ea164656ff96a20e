"""A real server with a keys file, over HTTP."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from service.cli import app
from tests.running import Running, serving, wait_until
from tests.test_serve import pronk


@dataclass
class Kept:
    """A running server and its keys file."""

    running: Running
    path: Path

    def keys(self, *arguments: str) -> str:
        done = CliRunner().invoke(app, ["keys", *arguments, "--file", str(self.path)])
        assert done.exit_code == 0, done.stderr
        return done.stdout.strip()

    def status(self, key: str, path: str = "/v1/models") -> int:
        headers = {"x-api-key": key}
        return httpx.get(self.running.url + path, headers=headers, timeout=10).status_code

    def left(self, key: str, name: str) -> int:
        headers = httpx.get(
            f"{self.running.url}/version", headers={"x-api-key": key}, timeout=10
        ).headers
        return int(headers[f"x-ratelimit-remaining-{name}"])

    def wait_for(self, key: str, status: int) -> None:
        wait_until(lambda: self.status(key) == status, f"{status} for the key", self.running)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kept]:
    path = tmp_path_factory.mktemp("keys") / "keys.toml"
    path.touch(0o600)
    with serving("--api-keys-file", str(path), "--sample") as running:
        yield Kept(running, path)


@pytest.mark.parametrize(
    ("text", "said"), [("[keys.", "not TOML"), (None, "cannot read"), ("[keys.a]", "keys.a.sha256")]
)
def test_a_broken_file_ends_the_start_in_one_line(
    tmp_path: Path, text: str | None, said: str
) -> None:
    path = tmp_path / "keys.toml"
    if text is not None:
        path.write_text(text)
    failed = pronk("serve", "--port", "0", "--api-keys-file", str(path))
    assert failed.returncode == 1
    assert said in failed.stderr
    assert "Traceback" not in failed.stderr


def test_keys_come_change_and_go_while_the_server_runs(kept: Kept) -> None:
    key = kept.keys("new", "alice")
    kept.wait_for(key, 200)
    other = kept.keys("rotate", "alice")
    kept.wait_for(other, 200)
    assert kept.status(key) == 401
    kept.keys("revoke", "alice")
    kept.wait_for(other, 401)


def test_a_file_broken_by_hand_locks_nobody_out_and_in(kept: Kept) -> None:
    key = kept.keys("new", "bob", "--admin")
    kept.wait_for(key, 200)
    good = kept.path.read_text()
    kept.path.write_text(good + "\n[keys.")

    def file_ok() -> float:
        text = httpx.get(f"{kept.running.url}/metrics", headers={"x-api-key": key}, timeout=10).text
        [line] = [line for line in text.splitlines() if line.startswith("pronk:keys_file_ok ")]
        return float(line.split()[1])

    wait_until(lambda: file_ok() == 0, "the broken file to be seen", kept.running)
    assert kept.status(key) == 200
    kept.path.write_text(good)
    wait_until(lambda: file_ok() == 1, "the good file to be seen", kept.running)
    assert kept.running.output().count("stay in force") == 1


def test_the_servers_own_sample_needs_no_key_of_the_file(kept: Kept) -> None:
    wait_until(lambda: "Once upon a time" in kept.running.output(), "the sample", kept.running)
    assert "the sample completion failed" not in kept.running.output()


def test_tokens_settle_to_what_was_made_also_where_the_client_leaves(kept: Kept) -> None:
    day = 100_000
    key = kept.keys("new", "dora", "--tokens-per-day", str(day), "--max-concurrency", "2")
    kept.wait_for(key, 200)
    url, headers = f"{kept.running.url}/v1/completions", {"x-api-key": key}
    body = {"prompt": "Once upon a time", "ignore_eos": True, "max_tokens": 30}
    whole = httpx.post(url, json=body, headers=headers, timeout=60)
    spent = whole.json()["usage"]["total_tokens"]
    assert int(whole.headers["x-ratelimit-remaining-tokens-day"]) == day - spent
    prompt = whole.json()["usage"]["prompt_tokens"]

    count, asked = 0, 900
    body |= {"stream": True, "max_tokens": asked}
    with httpx.stream("POST", url, json=body, headers=headers, timeout=60) as answer:
        told = int(answer.headers["x-ratelimit-remaining-tokens-day"])
        assert told == day - spent - prompt - asked, "held while it runs"
        for line in answer.iter_lines():
            count += line.startswith("data: {")
            if count == 5:
                break
    wait_until(
        lambda: kept.left(key, "concurrency") == 2, "the stream to be given up", kept.running
    )
    left = kept.left(key, "tokens-day")
    assert day - spent - prompt - asked < left <= day - spent - prompt - 5


def test_a_burst_from_many_clients_gets_no_more_than_the_rate(kept: Kept) -> None:
    rate = 12  # a minute: one more every five seconds
    key = kept.keys("new", "emil", "--rpm", str(rate))
    kept.wait_for(key, 200)
    url, headers = f"{kept.running.url}/v1/completions", {"x-api-key": key}
    body = {"prompt": "Once", "max_tokens": 1}

    def ask(number: int) -> int:
        return httpx.post(url, json=body, headers=headers, timeout=60).status_code

    start = time.monotonic()
    with ThreadPoolExecutor(12) as clients:
        statuses = Counter(clients.map(ask, range(60)))
    elapsed = time.monotonic() - start
    assert set(statuses) <= {200, 429}
    assert rate <= statuses[200] <= rate + elapsed / 5 + 1


def test_no_key_and_no_hash_is_printed(kept: Kept) -> None:
    key = kept.keys("new", "carol")
    kept.wait_for(key, 200)
    output = kept.running.output()
    assert key not in output
    assert "sha256" not in output
