"""Runs a reader on a hostile file in a process that may die of it, and says what became of both.

A server process, started once, imports everything and forks for each file: so a segmentation fault
in a native library, an endless loop or all memory taken ends one fork, and is told. ``python -m``
this module is that server: a JSON line in (reader, path), a JSON line out.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SECONDS = 20  # of a processor, and a little more of the clock: far above what any of them takes
MEBIBYTES = 512  # of address space and of resident memory, on top of what the imports took
_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Outcome:
    """``kind``: read, refused (by an error that a user may see), escaped (any other), killed."""

    kind: str
    text: str = ""
    grown: int = 0  # KiB of resident memory
    seconds: float = 0.0


class Isolation:
    """The server's other end. One file at a time."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=_ROOT,
            env=environment,
            text=True,
        )

    def run(self, reader: str, path: Path) -> Outcome:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([reader, str(path)]) + "\n")
        self._process.stdin.flush()
        return Outcome(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        self._process.communicate()
        assert self._process.returncode == 0


@contextlib.contextmanager
def isolation() -> Iterator[Isolation]:
    server = Isolation()
    try:
        yield server
    finally:
        server.close()


# --------------------------------------------------------------------------- the server


def main() -> None:
    from tests.fuzz.readers import READERS, warm_up

    warm_up()
    size, resident = _memory()
    for line in sys.stdin:
        reader, path = json.loads(line)
        outcome = _forked(READERS[reader], Path(path), size, resident)
        print(json.dumps(asdict(outcome)), flush=True)


def _memory() -> tuple[int, int]:
    """Address space in bytes, resident memory in KiB."""
    pages = list(map(int, Path("/proc/self/statm").read_text().split()[:2]))
    page = resource.getpagesize()
    return pages[0] * page, pages[1] * page // 1024


def _forked(read: Any, path: Path, size: int, resident: int) -> Outcome:
    out, into = os.pipe()
    begun = time.monotonic()
    if (child := os.fork()) == 0:
        os.close(out)
        _limit(size)
        os.write(into, json.dumps(_told(read, path)).encode()[:60_000])
        os._exit(0)
    os.close(into)
    with open(out, "rb") as opened:
        told = opened.read()
    _, status, usage = os.wait4(child, 0)
    grown, seconds = max(0, usage.ru_maxrss - resident), time.monotonic() - begun
    if os.WIFSIGNALED(status) or not told:
        number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        name = signal.Signals(number).name if number else f"exit {os.WEXITSTATUS(status)}"
        return Outcome("killed", name, grown, seconds)
    kind, text = json.loads(told)
    return Outcome(kind, text, grown, seconds)


def _limit(size: int) -> None:
    bound = size + (MEBIBYTES << 20)
    resource.setrlimit(resource.RLIMIT_AS, (bound, bound))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))  # first a SIGXCPU, then the end
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.alarm(6 * SECONDS)  # what waits for ever takes no processor time
    with open(os.devnull, "w") as nowhere:  # native libraries talk there, panics too
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)


def _told(read: Any, path: Path) -> tuple[str, str]:
    from tests.fuzz.readers import REFUSALS

    try:
        read(path)
    except REFUSALS as error:
        return "refused", str(error)[:20_000]
    except BaseException:  # a panic in a Rust library is no Exception
        return "escaped", traceback.format_exc()[-4000:]
    return "read", ""


if __name__ == "__main__":
    main()
