"""An engine ends with its parent, whatever ended that, and leaves no socket behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from service.engine.options import SOCKET_FOLDER_PREFIX

ROOT = Path(__file__).resolve().parents[2]
PARENT = """
import asyncio, sys
from service.engine.client import EngineClient
from service.engine.options import EngineOptions

async def main():
    options = EngineOptions(model="", socket="", log_level="error")
    client = EngineClient(options, worker="tests.engine.scripted_engine")
    await client.start()
    await client.wait_ready()
    print(client.pid, flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""
# Holds the interpreter lock for ever: only the kernel's alarm can end it.
LOCKED = """
import ctypes, os
from service.engine.lifeline import die_with_parent
os.read(0, 1)
die_with_parent(None, lambda: None)
print(os.getpid(), flush=True)
libc = ctypes.PyDLL(None)
while True:
    libc.pause()
"""


@contextmanager
def parent_process(code: str, folder: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(folder)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        yield process, int(process.stdout.readline())
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def is_gone(pid: int) -> bool:
    """Ended; a zombie nobody has reaped yet counts."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] in "ZX"
    except OSError:
        return True


def comes_to_pass(condition: Callable[[], bool], within: float) -> bool:
    give_up = time.monotonic() + within
    while not condition() and time.monotonic() < give_up:
        time.sleep(0.01)
    return condition()


def test_a_killed_parent_takes_its_engine_and_the_socket_with_it(tmp_path: Path) -> None:
    with parent_process(PARENT, tmp_path) as (parent, engine):
        assert list(tmp_path.glob(f"{SOCKET_FOLDER_PREFIX}*/engine.sock"))
        os.kill(parent.pid, signal.SIGKILL)
        assert comes_to_pass(lambda: is_gone(engine), within=10.0)
    assert list(tmp_path.iterdir()) == []


def test_an_engine_that_holds_the_interpreter_lock_ends_too(tmp_path: Path) -> None:
    starter = (
        "import subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-c', {LOCKED!r}], stdin=subprocess.PIPE)\n"
        "child.stdin.write(b'x'); child.stdin.flush(); child.wait()"
    )
    with parent_process(starter, tmp_path) as (parent, engine):
        time.sleep(0.1)
        os.kill(parent.pid, signal.SIGKILL)
        assert comes_to_pass(lambda: is_gone(engine), within=5.0)
