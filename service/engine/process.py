"""Starting the engine process and making sure that it ends: no orphan, no socket file."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import msgspec

import service
from service.engine.options import SOCKET_FOLDER_PREFIX, EngineOptions

SECRETS = ("PRONK_", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN")
WORKER = "service.engine.worker"
# OpenMP's threads spin while they wait, by default for milliseconds. Where cores are shared (with
# the HTTP process, with other containers) they burn the time of those they wait for. Measured, 2
# threads on 2 cores, milliseconds a decode step at one row, alone / beside a busy process:
#                        135M shape     bundled model
#   default              12.4 / -       0.5 / 97
#   PASSIVE (no spin)    16.8 / 21      1.2 / 1.9
#   1,000 turns          12.4 / 30      0.5 / 0.5 to 2.6
BRIEF_SPIN = ("GOMP_SPINCOUNT", "1000")


class EngineProcess:
    """One engine process. Its standard input is the life line: closing it ends the engine."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def spawn(cls, options: EngineOptions, module: str = WORKER) -> EngineProcess:
        """Start it in a session of its own, so that a terminal's Ctrl-C reaches only the parent."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",  # the folder pronk is started from must not shadow its packages
            "-m",
            module,
            stdin=asyncio.subprocess.PIPE,
            env=engine_environment(dict(os.environ)),
            start_new_session=True,
            pass_fds=() if options.recorder is None else (options.recorder,),
        )
        engine = cls(process)
        assert process.stdin is not None
        with contextlib.suppress(ConnectionError):  # it died at once: wait() tells how
            process.stdin.write(msgspec.json.encode(options) + b"\n")
            await process.stdin.drain()
        return engine

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process.returncode is None

    async def wait(self) -> int:
        """The exit code; negative is the signal that ended it."""
        return await self._process.wait()

    async def end(self, patience: float) -> int:
        """Wait ``patience`` seconds for it to leave by itself, then kill it."""
        try:
            async with asyncio.timeout(patience):
                return await self.wait()
        except TimeoutError:
            return await self.kill()
        finally:
            self.kill_now()

    async def kill(self) -> int:
        self.kill_now()
        return await self.wait()

    def kill_now(self) -> None:
        if self.is_running:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    def dump_stacks(self) -> None:
        """Ask a stuck engine to write every thread's stack to standard error."""
        if self.is_running:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGUSR1)


def engine_environment(environment: dict[str, str]) -> dict[str, str]:
    """What the engine inherits: no settings and no secrets, these packages first on its path."""
    kept = {key: value for key, value in environment.items() if not key.startswith(SECRETS)}
    root = str(Path(service.__file__).resolve().parent.parent)
    paths = [root, *filter(None, kept.get("PYTHONPATH", "").split(os.pathsep))]
    kept["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    if "OMP_WAIT_POLICY" not in kept:  # the operator's own choice
        kept.setdefault(*BRIEF_SPIN)
    return kept


def make_socket_path() -> str:
    """A path in a folder that is not there yet: the engine makes it, who also removes it should
    this process be killed; made here it would stay if that happened before the engine runs."""
    folder = SOCKET_FOLDER_PREFIX + secrets.token_urlsafe(6)
    return str(Path(tempfile.gettempdir()) / folder / "engine.sock")


def remove_socket(path: str) -> None:
    """Remove what a killed engine left; the folder too where it was made for the socket."""
    with contextlib.suppress(OSError):
        os.unlink(path)
    if Path(path).parent.name.startswith(SOCKET_FOLDER_PREFIX):
        shutil.rmtree(Path(path).parent, ignore_errors=True)
