"""Start pronk, load it at several concurrencies, print tok/s, TTFT and inter-token latency.

    python -m tests.benchmarks.serve                       # bundled model and the 135M shape
    python -m tests.benchmarks.serve --models 135m --concurrency 32

The share of the memory-bandwidth limit at one stream is taken against the read bandwidth measured
in the same run: a decoded token reads every weight once.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks import load, random_checkpoint
from tests.benchmarks.bandwidth import read_bandwidth

READY_TIMEOUT = 300.0


@dataclass(frozen=True)
class Started:
    """A pronk on a free port; seconds from the start of its process."""

    url: str
    accepting: float  # to the first answer of /livez
    first_token: float


@contextmanager
def server(model: str | None, *flags: str) -> Iterator[Started]:
    """A pronk of its own, ended when the block is left."""
    command = [sys.executable, "-m", "service.cli", "serve", *([model] if model else [])]
    command += ["--port", "0", "--no-sample", *flags]
    start = time.monotonic()
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        url = _address(process)
        accepting = _wait(f"{url}/livez", start)
        _wait(f"{url}/readyz", start)
        asyncio.run(load.request(url, {"prompt": [300], "max_tokens": 1, "stream": True}))
        yield Started(url, accepting, time.monotonic() - start)
    finally:
        process.terminate()
        process.communicate()


def _address(process: subprocess.Popen[str]) -> str:
    assert process.stderr is not None
    for line in process.stderr:
        if found := re.search(r"https?://[\w.:\[\]]+", line):
            return found.group()
    raise SystemExit(f"the server ended with code {process.wait()}")


def _wait(url: str, start: float) -> float:
    """Seconds from ``start`` to the first 200."""
    while time.monotonic() - start < READY_TIMEOUT:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return time.monotonic() - start
        except OSError:
            time.sleep(0.02)
    raise SystemExit("the server did not become ready")


def weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def measure(
    name: str, model: str | None, folder: Path, concurrencies: list[int], tokens: int
) -> None:
    bandwidth = read_bandwidth()
    limit = bandwidth / weight_bytes(folder)
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    with server(model) as started:
        url = started.url
        print(
            f"\n{name}: seconds from process start: accepts after {started.accepting:.1f},", end=""
        )
        print(f" first token after {started.first_token:.1f}")
        print(f"read bandwidth {bandwidth / 1e9:.1f} GB/s, limit at one stream {limit:.0f} tok/s")
        print(f"streams {load.HEADER}")
        asyncio.run(load.run(url, load.Workload(2, 4, 64, 16, vocabulary, seed=99)))  # warm
        for concurrency in concurrencies:
            work = load.Workload(
                concurrency, 3 * concurrency, 128, tokens, vocabulary, seed=concurrency
            )
            summary = asyncio.run(load.run(url, work))
            share = ""
            if concurrency == 1:
                decode = 1 / summary.gap_p50
                share = f"   decode {decode:.0f} tok/s: {100 * decode / limit:.0f} % of the limit"
            print(f"{concurrency:7d} {summary.row()}{share}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--models", nargs="+", default=["bundled", "135m"], choices=["bundled", "135m", "1b"]
    )
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument(
        "--folder", type=Path, help="where random checkpoints are kept between runs"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        for name in options.models:
            folder = (options.folder or Path(scratch)) / f"random-{name}"
            if name == "bundled":
                from model.bundled import bundled_model_path

                folder = bundled_model_path()
            elif not (folder / "config.json").exists():
                random_checkpoint.write(name, folder)
            model = None if name == "bundled" else str(folder)
            measure(name, model, folder, options.concurrency, options.output_tokens)


if __name__ == "__main__":
    main()
