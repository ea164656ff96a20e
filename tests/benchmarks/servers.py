"""pronk and its peers as processes to start, ask and stop; what each of them can be asked."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import psutil

from service.bench.client import Target, stream
from service.bench.load import Asking
from service.bench.workload import Job
from service.engine.machine import usable_cores

ROOT = Path(__file__).resolve().parent.parent.parent
READY_TIMEOUT = 300.0
GGUF_TYPES = {"bf16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}
ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


class Cannot(Exception):
    """This server cannot do what it is asked; the text says why in one line."""


@dataclass(frozen=True)
class Weights:
    """A random checkpoint, and the number format its matrices are to be used in."""

    folder: Path
    precision: str = "bf16"

    def gguf(self) -> Path:
        """Written once, beside the folder."""
        path = self.folder.with_name(f"{self.folder.name}-{GGUF_TYPES[self.precision]}.gguf")
        if not path.exists():
            script = [sys.executable, "-m", "tests.benchmarks.gguf_checkpoint"]
            names = [str(self.folder), f"{path}.part", "--type", GGUF_TYPES[self.precision]]
            subprocess.run([*script, *names], check=True, cwd=ROOT)
            Path(f"{path}.part").rename(path)
        return path


@dataclass(frozen=True)
class Room:
    """What a server must be able to hold: sequences at a time, tokens of each."""

    sequences: int = 32
    tokens: int = 2048


@dataclass(frozen=True)
class Started:
    """A server that has answered once; seconds from the start of its process."""

    target: Target
    process: subprocess.Popen[bytes]
    accepting: float  # to the first HTTP answer of any kind
    first_token: float

    def peak_memory(self) -> int:
        """Bytes: the peaks of its processes, added up."""
        try:
            main = psutil.Process(self.process.pid)
            members = [main, *main.children(recursive=True)]
        except psutil.NoSuchProcess:
            return 0
        return sum(_peak(member.pid) for member in members)


class Contender(ABC):
    """One server. ``takes_ids``: prompts may be lists of token ids."""

    name: str
    takes_ids = True
    takes_ignore_eos = True
    sends_model_name = False
    alive = ready = "/health"

    @abstractmethod
    def command(self, port: int, weights: Weights, room: Room) -> list[str]:
        """Raises ``Cannot`` for a precision it does not have."""

    def environment(self) -> dict[str, str]:
        return {}

    def asking(self) -> Asking:
        return Asking(ignore_eos=self.takes_ignore_eos)

    @contextmanager
    def running(self, weights: Weights, room: Room, timeout: float = 600.0) -> Iterator[Started]:
        """Started on a free port and asked once; ended when the block is left.

        Raises ``Cannot`` with the last words of its log where it does not get that far.
        """
        port = free_port()
        command = self.command(port, weights, room)
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("PRONK_")}
        with tempfile.TemporaryFile() as log:
            start = time.monotonic()
            process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=inherited | self.environment(),
                start_new_session=True,
            )
            try:
                target = Target(f"http://127.0.0.1:{port}", timeout=timeout)
                accepting = _wait(process, target.root + self.alive, start, log, any_status=True)
                _wait(process, target.root + self.ready, start, log)
                self._ask_once(target, log)
                yield Started(target, process, accepting, time.monotonic() - start)
            finally:
                end(process)

    def _ask_once(self, target: Target, log: IO[bytes]) -> None:
        asking = self.asking()
        prompt: list[int] | str = [300] if self.takes_ids else "time"
        trace = asyncio.run(stream(target, asking.path, asking.body(Job(prompt, 1))))
        if trace.failure:
            raise Cannot(f"{trace.failure}: {trace.detail or last_words(log)}")


@dataclass(frozen=True)
class Pronk(Contender):
    flags: tuple[str, ...] = ()
    name: str = "pronk"
    alive = "/livez"
    ready = "/readyz"

    def command(self, port: int, weights: Weights, room: Room) -> list[str]:
        precision = ["--quantization", weights.precision] if weights.precision != "bf16" else []
        command = [sys.executable, "-m", "service.cli", "serve", str(weights.folder), "--no-sample"]
        return [*command, "--port", str(port), *precision, *self.flags]

    def environment(self) -> dict[str, str]:
        return {"PYTHONPATH": str(ROOT)}


@dataclass(frozen=True)
class LlamaServer(Contender):
    """llama.cpp's own server, with as many slots as the workload has streams."""

    binary: str
    name: str = "llama.cpp"

    def command(self, port: int, weights: Weights, room: Room) -> list[str]:
        threads = str(usable_cores())
        context = str(room.sequences * (room.tokens + 64))
        command = [self.binary, "-m", str(weights.gguf()), "--port", str(port), "-c", context]
        return [*command, "-np", str(room.sequences), "-t", threads, "-tb", threads, "--offline"]


XLLAMACPP = """
import sys, time, xllamacpp
model, port, slots, context, threads = sys.argv[1], *map(int, sys.argv[2:])
params = xllamacpp.CommonParams()
params.model.path, params.port, params.n_parallel, params.n_ctx = model, port, slots, context
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
server = xllamacpp.Server(params)
while True:
    time.sleep(60)
"""


@dataclass(frozen=True)
class Xllamacpp(Contender):
    """llama.cpp's server inside the xllamacpp package, whose wheel has no AVX-512 code."""

    python: str
    name: str = "xllamacpp"

    def command(self, port: int, weights: Weights, room: Room) -> list[str]:
        context = room.sequences * (room.tokens + 64)
        numbers = map(str, (port, room.sequences, context, usable_cores()))
        return [self.python, "-c", XLLAMACPP, str(weights.gguf()), *numbers]


@dataclass(frozen=True)
class LlamaCppPython(Contender):
    """The server that comes with llama-cpp-python: one request after another."""

    python: str
    name: str = "llama-cpp-python"
    takes_ids = False
    alive = ready = "/v1/models"

    def command(self, port: int, weights: Weights, room: Room) -> list[str]:
        threads = str(usable_cores())
        command = [self.python, "-m", "llama_cpp.server", "--model", str(weights.gguf())]
        command += ["--port", str(port), "--n_ctx", str(room.tokens + 64)]
        command += ["--n_threads", threads, "--n_threads_batch", threads]
        return [*command, "--interrupt_requests", "False"]


@dataclass(frozen=True)
class Transformers(Contender):
    """``transformers serve``; prompts are text, and it has no word for going on past the end."""

    python: str
    batches: bool = True
    name: str = "transformers"
    takes_ids = False
    takes_ignore_eos = False

    def command(self, port: int, weights: Weights, room: Room) -> list[str]:
        if weights.precision != "bf16":
            raise Cannot(f"its server has no {weights.precision} weights for a processor")
        command = [self.python, "-m", "transformers.cli.transformers", "serve", str(weights.folder)]
        command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
        command += ["--dtype", "bfloat16"]
        if not self.batches:
            return command
        pages = room.sequences * (-(-room.tokens // 256) + 1) + 16
        batching = ["--continuous-batching", "--cb-block-size", "256"]
        return [*command, *batching, "--cb-num-blocks", str(pages), "--cb-max-batch-tokens", "512"]

    def environment(self) -> dict[str, str]:
        cache = Path(tempfile.gettempdir()) / "pronk-bench-hub"
        cache.mkdir(exist_ok=True)  # it wants to list one, even an empty one
        return {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache)}


@dataclass(frozen=True)
class Vllm(Contender):
    """vLLM for processors. Written after its documentation, not run: the package is too large."""

    python: str
    name: str = "vllm"

    def command(self, port: int, weights: Weights, room: Room) -> list[str]:
        if weights.precision != "bf16":
            raise Cannot(f"no {weights.precision} weights without a checkpoint of that kind")
        command = [self.python, "-m", "vllm.entrypoints.openai.api_server"]
        command += ["--model", str(weights.folder), "--port", str(port), "--dtype", "bfloat16"]
        length = str(room.tokens + 64)
        return [*command, "--max-model-len", length, "--max-num-seqs", str(room.sequences)]

    def environment(self) -> dict[str, str]:
        return {"VLLM_CPU_KVCACHE_SPACE": "4", "HF_HUB_OFFLINE": "1"}


@dataclass
class Found:
    """Peers that are there, and why others are not."""

    contenders: list[Contender] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)


def find_peers(python: str, llama_server: str | None) -> Found:
    found = Found()
    binary = llama_server or shutil.which("llama-server")
    if binary and shutil.which(binary):
        found.contenders.append(LlamaServer(binary))
    else:
        found.missing["llama.cpp"] = "no llama-server on the path, and no --llama-server"
    installed = _installed(python)
    peers: list[tuple[Contender, tuple[str, ...]]] = [
        (Xllamacpp(python), ("xllamacpp",)),
        (LlamaCppPython(python), ("llama_cpp", "starlette_context")),
        (Transformers(python), ("transformers", "accelerate", "fastapi", "openai")),
        (
            Transformers(python, batches=False, name="transformers, no batching"),
            ("transformers", "accelerate", "fastapi", "openai"),
        ),
        (Vllm(python), ("vllm",)),
    ]
    for contender, needed in peers:
        if lacking := [module for module in needed if module not in installed]:
            found.missing[contender.name] = f"{', '.join(lacking)} not installed for {python}"
        else:
            found.contenders.append(contender)
    return found


MODULES = ("xllamacpp", "llama_cpp", "starlette_context", "transformers", "accelerate", "fastapi")
MODULES += ("openai", "vllm")


def _installed(python: str) -> set[str]:
    """Which of ``MODULES`` that interpreter finds; none of them is imported."""
    code = "import importlib.util as u, sys; print(*filter(u.find_spec, sys.argv[1:]))"
    done = subprocess.run([python, "-c", code, *MODULES], capture_output=True, check=False)
    return set(done.stdout.decode().split())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(
    process: subprocess.Popen[bytes],
    url: str,
    start: float,
    log: IO[bytes],
    any_status: bool = False,
) -> float:
    """Seconds from ``start`` to the first 200."""
    while time.monotonic() - start < READY_TIMEOUT:
        if process.poll() is not None:
            raise Cannot(f"ended with code {process.returncode}: {last_words(log)}")
        try:
            with urllib.request.urlopen(url, timeout=5):
                return time.monotonic() - start
        except urllib.error.HTTPError as error:
            if any_status:
                return time.monotonic() - start
            error.close()
        except OSError:
            pass
        time.sleep(0.02)
    raise Cannot(f"not ready after {READY_TIMEOUT:.0f} s: {last_words(log)}")


def last_words(log: IO[bytes]) -> str:
    log.seek(0)
    lines = ESCAPES.sub("", log.read().decode(errors="replace")).strip().splitlines()
    return " ".join(line.strip() for line in lines[-2:])[:250] if lines else "it said nothing"


def end(process: subprocess.Popen[bytes]) -> None:
    """Ask it to go, then end its whole group."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(20)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _peak(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return 1024 * int(found[1]) if found else 0
