"""The load balancer of deploy/, for real: two replicas, streams as they come, nothing lost."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field

import httpx
import pytest

from tests.running import ROOT, Running, free_port, serving, wait_until

CONFIG = ROOT / "deploy" / "haproxy.cfg"

pytestmark = pytest.mark.skipif(
    shutil.which("haproxy") is None, reason="haproxy is not installed (Debian package haproxy)"
)


@dataclass
class Cluster:
    url: str
    replicas: list[Running]
    stack: ExitStack = field(repr=False)

    def start_replica(self, port: int) -> Running:
        return self.stack.enter_context(serving("--drain-delay", "1.5", "--no-sample", port=port))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with ExitStack() as stack:
        replicas = [
            stack.enter_context(serving("--drain-delay", "1.5", "--no-sample")) for _ in range(2)
        ]
        listen = f"127.0.0.1:{free_port()}"
        environment = os.environ | {"LISTEN": listen}
        for number, replica in enumerate(replicas, start=1):
            environment[f"REPLICA{number}"] = replica.url.removeprefix("http://")
        balancer = subprocess.Popen(
            ["haproxy", "-f", str(CONFIG), "-db"],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        stack.callback(balancer.wait)
        stack.callback(balancer.terminate)
        made = Cluster(f"http://{listen}", replicas, stack)
        wait_until(lambda: _status(made.url) == 200, "the balancer to see a ready replica")
        yield made


def _status(url: str) -> int:
    try:
        return httpx.get(f"{url}/v1/models", timeout=5).status_code
    except httpx.TransportError:
        return 0


def complete(url: str, tokens: int = 24) -> str:
    """One streamed completion; its text. Raises on anything but a whole stream."""
    body = {"prompt": "Once upon a time", "max_tokens": tokens, "stream": True, "ignore_eos": True}
    lines: list[str] = []
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
        assert answer.status_code == 200, answer.read()
        lines = [line for line in answer.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]", "a cut stream"
    assert not any('"error"' in line for line in lines), lines
    return "".join(lines)


def test_the_configuration_is_valid() -> None:
    environment = os.environ | {
        "LISTEN": "127.0.0.1:1",
        "REPLICA1": "127.0.0.1:2",
        "REPLICA2": "127.0.0.1:3",
    }
    checked = subprocess.run(
        ["haproxy", "-c", "-f", str(CONFIG)], env=environment, capture_output=True, check=False
    )
    assert checked.returncode == 0, checked.stderr.decode()


def test_chunks_pass_the_balancer_as_they_come(cluster: Cluster) -> None:
    body = {"prompt": "Once", "max_tokens": 200, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{cluster.url}/v1/completions", json=body, timeout=60) as answer:
        pieces = [piece for piece in answer.iter_raw() if b"data:" in piece]
    assert len(pieces) > 10, "the answer came in one piece: something buffers"


def test_both_replicas_are_used(cluster: Cluster) -> None:
    workers = [threading.Thread(target=complete, args=(cluster.url,)) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for replica in cluster.replicas:
        metrics = httpx.get(f"{replica.url}/metrics", timeout=10).text
        served = [
            float(line.split()[-1])
            for line in metrics.splitlines()
            if line.startswith("vllm:request_success_total")
        ]
        assert sum(served) > 0


def test_a_rolling_restart_under_load_loses_nothing(cluster: Cluster) -> None:
    """Each replica is drained and started anew while eight clients stream without a pause."""
    stop = threading.Event()
    answered: list[str] = []
    failed: list[str] = []

    def client() -> None:
        while not stop.is_set():
            try:
                answered.append(complete(cluster.url))
            except Exception as error:
                failed.append(repr(error))

    clients = [threading.Thread(target=client) for _ in range(8)]
    for thread in clients:
        thread.start()
    try:
        for number, replica in enumerate(list(cluster.replicas)):
            assert replica.end(signal.SIGTERM) == 0, replica.output()
            port = int(replica.url.rpartition(":")[2])
            cluster.replicas[number] = cluster.start_replica(port)
            time.sleep(1.5)  # the balancer sees it ready before the other one goes
    finally:
        stop.set()
        for thread in clients:
            thread.join()
    assert failed == []
    assert len(answered) > 20
