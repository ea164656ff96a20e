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
import tempfile
from pathlib import Path

from model import random_checkpoint
from service.bench.load import Asking, Level, run
from service.bench.rates import read_bandwidth
from service.bench.report import serve_table
from service.bench.summary import Summary, summarize
from service.bench.workload import Lengths, Workload
from tests.benchmarks.servers import Pronk, Room, Started, Weights


def weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def measure(name: str, folder: Path, concurrencies: list[int], tokens: int) -> None:
    bandwidth = read_bandwidth()
    limit = bandwidth / weight_bytes(folder)
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    workload = Workload(output_len=Lengths(tokens, tokens), vocabulary=vocabulary)
    with Pronk().running(Weights(folder), Room()) as started:
        print(
            f"\n{name}: seconds from process start: accepts after {started.accepting:.1f}, ", end=""
        )
        print(f"first token after {started.first_token:.1f}")
        print(f"read bandwidth {bandwidth / 1e9:.1f} GB/s, limit at one stream {limit:.0f} tok/s")
        load(started, Workload(output_len=Lengths(16, 16), vocabulary=vocabulary, seed=99), 2)
        levels = [load(started, workload, concurrency) for concurrency in concurrencies]
    print(serve_table(levels))
    for level in levels:
        if level.level == 1 and level.itl.p50:
            decode = 1 / level.itl.p50
            print(f"decode {decode:.0f} tok/s: {100 * decode / limit:.0f} % of the limit")


def load(started: Started, workload: Workload, concurrency: int) -> Summary:
    """Three requests a stream."""
    level = Level("concurrency", concurrency)
    jobs = workload.jobs(3 * concurrency, stream=concurrency)
    return summarize(level, *asyncio.run(run(started.target, Asking(), level, jobs)))


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
            measure(name, folder, options.concurrency, options.output_tokens)


if __name__ == "__main__":
    main()
