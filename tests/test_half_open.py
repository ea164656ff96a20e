"""A peer that vanishes without a word, over a real wire that is cut: two network namespaces."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.running import ROOT, free_port

SERVER, CLIENT = "10.213.7.1", "10.213.7.2"
WRITE_TIMEOUT = 1.5
STREAM = """
import http.client, json, sys, time
connection = http.client.HTTPConnection(sys.argv[1], int(sys.argv[2]), timeout=60)
body = {"prompt": "A long story", "max_tokens": 900, "ignore_eos": True, "stream": True, "n": 8}
headers = {"Content-Type": "application/json"}
connection.request("POST", "/v1/completions", json.dumps(body), headers)
answer = connection.getresponse()
print(answer.read1(10), flush=True)
time.sleep(600)
"""


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@dataclass
class Wire:
    """Two hosts and the cable between them."""

    server: str
    client: str

    def run(self, host: str, *command: str, **pipes: int) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["ip", "netns", "exec", host, sys.executable, *command],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            cwd=ROOT,
            text=True,
            **pipes,  # type: ignore[call-overload]
        )

    def cut(self) -> None:
        ip("-n", self.client, "link", "set", "wire", "down")

    def metrics(self, port: int) -> str:
        """As the server's own host sees them."""
        code = (
            "import urllib.request as r; "
            f"print(r.urlopen('http://{SERVER}:{port}/metrics', timeout=5).read().decode())"
        )
        command = ["ip", "netns", "exec", self.server, sys.executable, "-c", code]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout


@pytest.fixture
def wire() -> Iterator[Wire]:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("needs root and iproute2: it makes network namespaces")
    made = Wire(f"pronk-s{os.getpid()}", f"pronk-c{os.getpid()}")
    try:
        for host in (made.server, made.client):
            ip("netns", "add", host)
            ip("-n", host, "link", "set", "lo", "up")
        peer = ("peer", "name", "wire", "netns", made.client)
        ip("-n", made.server, "link", "add", "wire", "type", "veth", *peer)
        for host, address in ((made.server, SERVER), (made.client, CLIENT)):
            ip("-n", host, "address", "add", f"{address}/24", "dev", "wire")
            ip("-n", host, "link", "set", "wire", "up")
    except subprocess.CalledProcessError as error:
        for host in (made.server, made.client):
            subprocess.run(["ip", "netns", "delete", host], check=False, capture_output=True)
        pytest.skip(f"no namespaces can be made here: {error.stderr!r:.200}")
    yield made
    for host in (made.server, made.client):
        ip("netns", "delete", host)


def value(metrics: str, name: str) -> float:
    return sum(float(found) for found in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", metrics, re.M))


def wait_for(condition: object, seconds: float) -> bool:
    assert callable(condition)
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.2)
    return bool(condition())


def test_a_reader_that_vanished_is_found_out_and_its_generation_cancelled(wire: Wire) -> None:
    """Nobody tells the server: no goodbye, no reset, not even an unreachable host."""
    port = free_port()
    flags = ["--host", SERVER, "--port", str(port), "--write-timeout", str(WRITE_TIMEOUT)]
    server = wire.run(wire.server, "-m", "service.cli", "serve", "--no-sample", *flags)
    client = None
    try:
        assert wait_for(lambda: value(wire.metrics(port), "pronk:engine_ready") == 1, 60)
        pipe = subprocess.PIPE
        client = wire.run(wire.client, "-c", STREAM, SERVER, str(port), stdout=pipe)
        assert client.stdout is not None
        assert client.stdout.readline().startswith("b'data")
        wire.cut()
        assert wait_for(
            lambda: value(wire.metrics(port), "pronk:requests_cancelled_total") == 1, 20
        )
        assert wait_for(lambda: value(wire.metrics(port), "vllm:num_requests_running") == 0, 5)
        metrics = wire.metrics(port)
        assert value(metrics, "pronk:requests_finished_total") == 0
        assert value(metrics, "vllm:kv_cache_usage_perc") == 0
        assert value(metrics, "pronk:connections") == 1  # the one that asks
    finally:
        for process in (server, client):
            if process is not None:
                process.kill()
                process.communicate()
