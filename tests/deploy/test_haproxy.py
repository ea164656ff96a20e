"""The load balancer of deploy/, for real: two replicas, streams as they come, nothing lost."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Iterator

import httpx
import pytest

from tests.deploy.cluster import CONFIG, HAS_BALANCER, NO_BALANCER, Cluster, running_cluster

pytestmark = pytest.mark.skipif(not HAS_BALANCER, reason=NO_BALANCER)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running_cluster() as made:
        yield made


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


def test_a_restart_under_load_loses_nothing(cluster: Cluster) -> None:
    """One is drained and started anew while eight clients stream without a pause; both of them,
    twice, and two thousand requests: ``test_rolling_restart.py``."""
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
        cluster.restart(0)
        time.sleep(1.5)  # the balancer sees it ready
    finally:
        stop.set()
        for thread in clients:
            thread.join()
    assert failed == []
    assert len(answered) > 20
