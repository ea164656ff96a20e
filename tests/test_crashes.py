"""What is left when a process dies of a bug: where it was, never what it held."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

START = """
import asyncio, ctypes, os, resource, threading
resource.setrlimit(resource.RLIMIT_CORE, (resource.getrlimit(resource.RLIMIT_CORE)[1],) * 2)
from service.crashes import forbid_core_dumps, log_loop_failure, log_uncaught
from service.logs import configure_logging
configure_logging("debug", "text")
log_uncaught()
canary = "xylographic-" + "quokka"
"""
MAIN = "raise ValueError(canary)"
THREAD = "threading.Thread(target=int, args=(canary,)).start()"
UNRAISABLE = """
class Held:
    def __del__(self):
        raise ValueError(canary)
del [Held()][0]
"""
TASK = """
async def fail():
    raise ValueError(canary)
async def main():
    asyncio.get_running_loop().set_exception_handler(log_loop_failure)
    task = asyncio.create_task(fail(), name=canary)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    del task
asyncio.run(main())
"""
CALLBACK = """
async def main():
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(log_loop_failure)
    loop.call_soon(int, canary)
    await asyncio.sleep(0.01)
asyncio.run(main())
"""


def run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", START + code]
    return subprocess.run(
        command, cwd=folder, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )


@pytest.mark.parametrize("code", [MAIN, THREAD, UNRAISABLE, TASK, CALLBACK])
def test_an_exception_nobody_caught_is_logged_without_its_words(code: str, tmp_path: Path) -> None:
    said = run(code, tmp_path).stderr
    assert "ValueError" in said
    assert "File " in said
    assert "xylographic-quokka" not in said


def can_dump(tmp_path: Path) -> bool:
    pattern = Path("/proc/sys/kernel/core_pattern")
    if not pattern.exists() or "/" in pattern.read_text():
        return False
    run("os.abort()", tmp_path)
    return bool(list(tmp_path.glob("core*")))


def test_a_crash_writes_no_memory_to_disk(tmp_path: Path) -> None:
    """With the limit the process was started with it would: that is looked at first."""
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    if not can_dump(first):
        pytest.skip("this system writes no core file into the working folder")
    ended = run("forbid_core_dumps()\nos.abort()", second)
    assert ended.returncode == -6
    assert list(second.iterdir()) == []


def test_the_limit_can_be_lifted_again_by_who_may(tmp_path: Path) -> None:
    code = "hard = resource.getrlimit(resource.RLIMIT_CORE)[1]\nforbid_core_dumps()\n"
    told = run(
        code + "print(resource.getrlimit(resource.RLIMIT_CORE) == (min(1, hard) "
        "if hard >= 0 else 1, hard))",
        tmp_path,
    )
    assert told.stdout == "True\n"
