"""The issue's targets on a GPU, each as a share of a limit measured in the same run.

    python -m tests.benchmarks.gpu_targets                        8B shape, random weights, on CUDA
    python -m tests.benchmarks.gpu_targets --shape tiny --device cpu --rows 4 --prompt 256

Decode at one row against the memory's bandwidth, decode at ``--rows`` against weights and keys over
bandwidth, a prompt of ``--prompt`` tokens against the bf16 matrix rate, and what of the engine's
steps was not spent in the network.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NamedTuple

import torch

from model.batch import Batch, BatchBuilder, BatchRow
from model.kv_cache import KVCache, bytes_per_block
from model.llama import Llama
from model.random_checkpoint import SHAPES
from model.regional import settle_regions
from model.stopwatch import Stopwatch
from service.bench import rates
from service.engine.capacity import Limits
from service.engine.runner import ModelRunner
from tests.benchmarks import engine_gap
from tests.benchmarks.decode_step import config_of, random_model

BLOCK_SIZE, REPEATS = 256, 5
FEW, MANY, PREFILL, GAP = 0.85, 0.80, 0.60, 0.05  # the issue's, of an H200


class Target(NamedTuple):
    what: str
    share: float
    wanted: float
    is_least: bool = True

    def __str__(self) -> str:
        is_met = self.share >= self.wanted if self.is_least else self.share <= self.wanted
        bound = "at least" if self.is_least else "at most"
        verdict = "met" if is_met else "missed"
        return f"{self.what:<44} {self.share:7.1%}  {bound} {self.wanted:.0%}: {verdict}"


class Steps:
    """A model beside a cache for all that is measured, steps by graph where they can be."""

    def __init__(self, model: Llama, options: argparse.Namespace) -> None:
        self.model, self.context = model, options.context
        self.pages = -(-max(options.context, options.prompt) // BLOCK_SIZE)
        self.blocks = 1 + options.rows * self.pages
        self.cache = KVCache(model.config, self.blocks, BLOCK_SIZE, model.cache_dtype, model.device)
        tokens = max(options.rows, options.prompt)
        self.limits = Limits(options.rows, tokens, self.pages * BLOCK_SIZE, BLOCK_SIZE)
        self.runner = ModelRunner(model, self.cache, self.limits)
        self.runner.capture_graphs()
        self.builder = BatchBuilder(tokens, options.rows, self.pages, BLOCK_SIZE, model.device)

    def decodes(self, rows: int) -> Batch:
        tables = [
            list(range(1 + row * self.pages, 1 + (row + 1) * self.pages)) for row in range(rows)
        ]
        return self.builder.build([BatchRow([7], self.context - 1, table, 1) for table in tables])

    def prompt(self, length: int) -> Batch:
        table = list(range(1, 1 + self.pages))
        return self.builder.build([BatchRow([7] * length, 0, table, 1)])

    @torch.inference_mode()
    def seconds(self, batch: Batch) -> float:
        return min(self._timed(lambda: self.runner.forward(batch)) for _ in range(1 + REPEATS))

    def _timed(self, work: Callable[[], object]) -> float:
        watch = Stopwatch(self.model.device)
        work()
        watch.stop()
        return watch.seconds

    def key_bytes(self, rows: int) -> float:
        """That one decode of so many rows reads."""
        block = bytes_per_block(self.model.config, BLOCK_SIZE, self.model.cache_dtype)
        return rows * self.context * block / BLOCK_SIZE


def prompt_operations(model: Llama, length: int) -> float:
    """Two for each weight and token; causal attention's scores and mixes, half of the square."""
    config = model.config
    weights = model.num_parameters - config.vocab_size * config.hidden_size
    attention = 2 * length**2 * config.num_heads * config.head_size * config.num_layers
    return 2.0 * weights * length + attention


def measure(options: argparse.Namespace) -> list[Target]:
    model = random_model(config_of(options.shape), options)
    words = settle_regions(model, options.compile)
    steps, limits = Steps(model, options), rates.measure(options.device)
    print(f"{options.shape} on {options.device}, {model.path} {words}; {rates.describe(limits)}")
    bandwidth = limits.read_bytes_per_second
    found = []
    for rows, wanted in ((1, FEW), (options.rows, MANY)):
        bound = (model.weight_bytes + steps.key_bytes(rows)) / bandwidth
        seconds = steps.seconds(steps.decodes(rows))
        what = f"decode of {rows} rows at {options.context}, {seconds * 1e3:.2f} ms"
        found.append(Target(what, bound / seconds, wanted))
    seconds = steps.seconds(steps.prompt(options.prompt))
    rate = prompt_operations(model, options.prompt) / seconds
    what = f"prompt of {options.prompt}, {options.prompt / seconds:,.0f} tokens/s"
    found.append(Target(what, rate / limits.matrix_operations_per_second, PREFILL))
    share = engine_gap.run(options, "greedy", steps.runner, steps.limits, steps.blocks)
    found.append(Target("of a step outside the network", share, GAP, is_least=False))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--prompt", type=int, default=8192)
    parser.add_argument("--tokens", type=int, default=64, help="of each stream, for the gap")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--compile", choices=["auto", "on", "off"], default="auto")
    parser.add_argument("--in-turn", dest="ahead", action="store_false")
    parser.set_defaults(dtype="bfloat16", no_kernels=False, profile=False)
    parser.set_defaults(kv_cache_dtype="auto", quantization="none")
    for target in measure(parser.parse_args()):
        print(target)


if __name__ == "__main__":
    main()
