"""pronk has no network of its own: a server without a route serves, and never looks for one.

In a network namespace whose only interface is ``lo``; a guard in every Python process of the
server notes each connection, name and datagram asked for that is not of this machine. What the
operating system counts is looked at too: ``lo`` alone has moved a packet.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

# Loaded by Python itself before anything of the server is, in each of its processes.
GUARD = """
import os, socket, sys
LOCAL = ("127.0.0.1", "::1", "localhost")
def note(event, arguments):
    if event in ("socket.connect", "socket.sendto"):
        where = arguments[1]
        host = where[0] if isinstance(where, tuple) else None
        foreign = host is not None and host not in LOCAL
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        foreign = arguments[0] not in (None, b"", "", *LOCAL)
    else:
        return
    if foreign:
        with open(os.environ["GUARD_NOTES"], "a") as notes:
            print(event, arguments[1:] if event == "socket.connect" else arguments, file=notes)
sys.addaudithook(note)
with open(os.environ["GUARD_NOTES"] + ".seen", "a") as seen:
    print(os.getpid(), *sys.orig_argv, file=seen)
"""
# In the namespace: bring lo up, serve, ask, end; print what was answered and what each interface
# has sent.
SCRIPT = """
ip link set lo up
"$PYTHON" -m service.cli serve --no-sample --port 8123 --threads 1 "$@" > "$LOG" 2>&1 &
server=$!
"$PYTHON" -c '
import sys, time, httpx
give_up = time.monotonic() + 120
while time.monotonic() < give_up:
    try:
        if httpx.get("http://127.0.0.1:8123/readyz").status_code == 200:
            break
    except httpx.TransportError:
        pass
    time.sleep(0.1)
body = {"prompt": "Once upon a time", "max_tokens": 5}
wanted = {"choice": ["yes", "no"]}
for path in ("/v1/completions", "/v1/embeddings"):
    sent = body | {"structured_outputs": wanted} if "comp" in path else {"input": "a"}
    answer = httpx.post(f"http://127.0.0.1:8123{path}", json=sent, timeout=60)
    print(path, answer.status_code)
image = [{"type": "image_url", "image_url": {"url": "http://192.0.2.1/a.png"}}]
sent = {"messages": [{"role": "user", "content": image}]}
print("image", httpx.post("http://127.0.0.1:8123/v1/chat/completions", json=sent).status_code)
'
kill -TERM $server
wait $server
echo "exit $?"
awk 'NR > 2 {print "interface", $1, $10}' /proc/net/dev
"""


def run_isolated(folder: Path, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "sitecustomize.py").write_text(GUARD)
    dropped = ("PRONK_", "HF_", "HUGGING", "TRANSFORMERS_", "http", "HTTP", "no_proxy", "NO_PROXY")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
    environment |= {
        "PYTHON": sys.executable,
        "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}",
        "GUARD_NOTES": str(folder / "notes"),
        "LOG": str(folder / "log"),
        "HF_HOME": str(folder / "hub"),  # empty, and HF_HUB_OFFLINE is not set
    }
    return subprocess.run(
        ["unshare", "-rn", "bash", "-c", script, "bash", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


@pytest.fixture
def folder() -> Iterator[Path]:
    if not shutil.which("unshare") or not shutil.which("ip"):
        pytest.skip("unshare or ip is not here: no network namespace can be made")
    tried = subprocess.run(["unshare", "-rn", "true"], capture_output=True, check=False)
    if tried.returncode:
        pytest.skip("this user may not make network namespaces")
    with tempfile.TemporaryDirectory(prefix="offline-") as name:
        yield Path(name)


def test_a_server_without_a_route_serves_and_looks_for_none(folder: Path) -> None:
    ran = run_isolated(folder, SCRIPT)
    log = (folder / "log").read_text()
    told = ran.stdout.splitlines()
    assert "/v1/completions 200" in told, log + ran.stdout + ran.stderr
    assert "/v1/embeddings 200" in told
    assert "image 400" in told
    assert "exit 0" in told
    seen = (folder / "notes.seen").read_text()
    for process in ("service.cli serve", "service.engine.worker", "service.engine.grammar_trial"):
        assert process in seen, "the guard was in it"
    assert not (folder / "notes").exists(), (folder / "notes").read_text()
    sent = {line.split()[1]: int(line.split()[2]) for line in told if line.startswith("interface")}
    assert sent.pop("lo:") > 0
    assert not any(sent.values())


def test_a_hub_id_is_the_one_thing_that_looks_for_the_network_and_says_it_is_not_there(
    folder: Path,
) -> None:
    """It also shows that the guard sees what it is for."""
    script = 'ip link set lo up; timeout 100 "$PYTHON" -m service.cli serve "$@" --port 8124'
    ran = run_isolated(folder, script, "some-organisation/some-model")
    said = ran.stdout + ran.stderr
    assert ran.returncode == 1, said
    assert "Traceback" not in said
    assert "some-organisation/some-model" in said
    assert "huggingface.co" in (folder / "notes").read_text()


def test_offline_not_even_a_hub_id_does(folder: Path) -> None:
    script = 'ip link set lo up; timeout 100 "$PYTHON" -m service.cli serve "$@" --port 8124'
    ran = run_isolated(folder, script, "some-organisation/some-model", "--offline")
    assert ran.returncode == 1
    assert not (folder / "notes").exists()
