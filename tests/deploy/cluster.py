"""Two replicas behind deploy/haproxy.cfg, for real."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import httpx

from tests.running import ROOT, Running, free_port, serving, wait_until

CONFIG = ROOT / "deploy" / "haproxy.cfg"
REPLICA = ("--drain-delay", "1.5", "--no-sample")
HAS_BALANCER = shutil.which("haproxy") is not None
NO_BALANCER = "haproxy is not installed (Debian package haproxy)"


@dataclass
class Cluster:
    url: str
    replicas: list[Running]
    stack: ExitStack = field(repr=False)

    def restart(self, number: int) -> None:
        """Ended as an operator would and started anew at its address; ready when it returns."""
        replica = self.replicas[number]
        assert replica.end(signal.SIGTERM) == 0, replica.output()
        port = int(replica.url.rpartition(":")[2])
        self.replicas[number] = self.stack.enter_context(serving(*REPLICA, port=port))


@contextmanager
def running_cluster() -> Iterator[Cluster]:
    with ExitStack() as stack:
        replicas = [stack.enter_context(serving(*REPLICA)) for _ in range(2)]
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
