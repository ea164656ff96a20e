"""``pronk top`` against scripted servers and a real one: what it prints, and how it fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from model.bundled import bundled_model_path
from tests.running import ROOT, free_port, serving
from tests.top.scripted_server import Script, scripted
from tests.top.test_figures import AFTER, BEFORE


def top(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "service.cli", "top", *arguments]
    own = {k: v for k, v in os.environ.items() if not k.startswith("PRONK_")}
    own |= {"COLUMNS": "80", **environment}
    return subprocess.run(
        command, cwd=ROOT, env=own, capture_output=True, text=True, timeout=60, check=False
    )


def test_one_look_prints_a_table_in_a_dumb_terminal() -> None:
    script = Script(BEFORE, AFTER)
    with scripted(script) as url:
        done = top(url, "--once", "--interval", "0.2", "--api-key", "k", TERM="dumb")
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    assert "queue_full 7" in done.stdout
    assert set(script.keys) == {"Bearer k"}


def test_json_is_one_line_with_every_server() -> None:
    with scripted(Script(BEFORE, AFTER)) as one, scripted(Script(AFTER)) as two:
        done = top(one, two, "--once", "--json", "--interval", "0.2")
    [line] = done.stdout.splitlines()
    found = json.loads(line)["servers"]
    assert [server["url"] for server in found] == [one, two]
    assert found[0]["generation_rate"] > 0 == found[1]["generation_rate"]
    assert found[0]["keys"][0]["name"] == "a"


def test_a_server_that_loads_is_shown_with_stage_progress_and_reason() -> None:
    told = '{"status":"not_ready","stage":"loading","progress":0.4,"reason":"reading weights"}'
    with scripted(Script(AFTER, readyz=(503, told))) as url:
        done = top(url, "--once", "--interval", "0.2")
    assert "● loading 40%: reading weights" in done.stdout


@pytest.mark.parametrize(
    ("script", "told"),
    [
        (Script("", status=401), "wants an API key: --api-key or PRONK_API_KEY"),
        (Script("", status=403), "shows its metrics to admin keys only"),
        (Script("", status=404), "answers /metrics with 404: is it pronk?"),
        (Script("<html>"), "is it pronk?"),
        (Script("up 1\n"), "has nothing of pronk's"),
    ],
)
def test_what_cannot_be_shown_is_one_clear_line(script: Script, told: str) -> None:
    with scripted(script) as url:
        done = top(url, "--once")
    assert done.returncode == 1
    assert told in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


@pytest.mark.parametrize("url", [f"127.0.0.1:{free_port()}", "ftp://x", "http://"])
def test_nobody_there_is_one_clear_line(url: str) -> None:
    done = top(url, "--once")
    assert done.returncode == 1
    assert "cannot be reached" in done.stderr or "is no http or https URL" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.skipif(
    not (bundled_model_path() / "model.safetensors").is_file(), reason="no bundled weights here"
)
def test_a_real_server_shows_its_keys_and_what_they_got(tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    command = [sys.executable, "-m", "service.cli", "keys", "new"]
    secrets = {
        name: subprocess.run(
            [*command, name, *rights, "--file", str(keys)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for name, *rights in (("alice",), ("ops", "--admin"))
    }
    arguments = ["--no-sample", "--threads", "1", "--num-kv-blocks", "16"]
    with serving(*arguments, "--api-keys-file", str(keys)) as server:
        body = {"prompt": "Once", "max_tokens": 7, "ignore_eos": True}
        headers = {"Authorization": f"Bearer {secrets['alice']}"}
        for _ in range(3):
            answer = httpx.post(f"{server.url}/v1/completions", json=body, headers=headers)
            assert answer.status_code == 200
        flags = (server.url, "--once", "--json", "--interval", "0.2")
        [found] = json.loads(top(*flags, "--api-key", secrets["ops"]).stdout)["servers"]
        assert top(*flags, "--api-key", secrets["alice"]).returncode == 1
        assert top(*flags).returncode == 1
    assert found["readiness"]["stage"] == "ready"
    assert found["outcomes"]["finished"] == 3
    assert found["keys"][0]["name"] == "alice"
    assert found["keys"][0]["requests"] == 3
    assert found["connections"] >= 1
