"""Processes of a server that serves are killed or stopped from outside: nothing is left behind."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import httpx
import psutil
import pytest

from service.engine.options import SOCKET_FOLDER_PREFIX
from tests.running import Running, free_port, serving, wait_until

GRAMMAR = {"prompt": "a", "max_tokens": 3, "structured_outputs": {"regex": "[a-z]+"}}


def family(running: Running) -> list[psutil.Process]:
    """Engine and what it started; with a grammar compiled, so that its helper is there too."""
    answer = httpx.post(f"{running.url}/v1/completions", json=GRAMMAR, timeout=60)
    assert answer.status_code == 200, answer.text
    found = psutil.Process(running.process.pid).children(recursive=True)
    names = [" ".join(process.cmdline()) for process in found]
    assert any("grammar_trial" in name for name in names), names
    return found


def shared_memory() -> set[str]:
    """Ours: other processes of the machine come and go."""
    folder = Path("/dev/shm")
    return {path.name for path in folder.iterdir() if path.owner() == Path.home().owner()}


@pytest.mark.parametrize(
    "stopped_first",
    [
        pytest.param(False, id="killed"),
        pytest.param(True, id="stopped_then_killed", marks=pytest.mark.slow),
    ],
)
def test_a_killed_server_leaves_nothing_and_its_successor_binds_at_once(
    stopped_first: bool, tmp_path: Path
) -> None:
    port, shared = free_port(), shared_memory()
    environment = {"TMPDIR": str(tmp_path)}
    with serving("--no-sample", port=port, **environment) as running:
        processes = family(running)
        assert list(tmp_path.glob(f"{SOCKET_FOLDER_PREFIX}*/engine.sock"))
        with httpx.stream(
            "POST",
            f"{running.url}/v1/completions",
            json={"prompt": "Once", "stream": True, "max_tokens": 900, "ignore_eos": True},
            timeout=60,
        ) as answer:
            next(answer.iter_lines())  # the engine is in the middle of its work
            if stopped_first:
                running.process.send_signal(signal.SIGSTOP)
                time.sleep(0.2)
            running.process.kill()
            running.process.wait()
        with serving("--no-sample", ready=False, port=port, **environment) as successor:
            wait_until(lambda: status(successor, "/livez") == 200, "the port", successor)
        psutil.wait_procs(processes, timeout=15)
        assert [process for process in processes if process.is_running()] == []
    wait_until(lambda: not list(tmp_path.glob(f"{SOCKET_FOLDER_PREFIX}*")), "the sockets to go")
    assert shared_memory() - shared == set()


def status(running: Running, path: str) -> int:
    try:
        return httpx.get(f"{running.url}{path}", timeout=5).status_code
    except httpx.TransportError:
        return 0


def test_a_hung_engine_is_told_of_replaced_and_counted() -> None:
    with serving("--no-sample", "--watchdog-timeout", "3") as running:
        (engine,) = psutil.Process(running.process.pid).children()
        os.kill(engine.pid, signal.SIGSTOP)
        reasons: list[str] = []

        def is_unready() -> bool:
            answer = httpx.get(f"{running.url}/readyz", timeout=5)
            reasons.append(answer.json()["reason"])
            return answer.status_code == 503

        wait_until(is_unready, "the hung engine to be seen", running)
        assert "no sign of life" in reasons[-1]
        body = {"prompt": "Once", "max_tokens": 3}
        refused = httpx.post(f"{running.url}/v1/completions", json=body, timeout=5)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_restarting")
        assert int(refused.headers["retry-after"]) >= 1
        running.wait_ready()
        assert not psutil.pid_exists(engine.pid)
        answer = httpx.post(f"{running.url}/v1/completions", json=body, timeout=30)
        assert answer.status_code == 200
        metrics = httpx.get(f"{running.url}/metrics", timeout=5).text.splitlines()
        restarts = [line for line in metrics if line.startswith("pronk:engine_restarts_total")]
        assert [line for line in restarts if line.endswith(" 1.0")] == [
            line for line in restarts if 'reason="stalled"' in line
        ]
        assert "the engine is stuck: no sign of life" in running.output()
