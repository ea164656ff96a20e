"""How long a step takes inside the network, with random weights: no server, no sampling.

    python -m tests.benchmarks.decode_step --shape 135m --rows 1 8 32 --context 256

Prints milliseconds a decode step and tokens a second for each number of rows, prompt tokens a
second, and beside each the memory's read bandwidth or the rate of a bf16 product, measured in turn
with it, and the share of that bound (CPU only). ``--profile`` lists the operations of the last
decode instead.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

from model.batch import Batch, BatchBuilder, BatchRow
from model.config import ModelConfig
from model.kv_cache import KVCache
from model.kv_format import KV_CACHE_DTYPES, cache_format
from model.layers import pack_for_onednn
from model.llama import Llama
from model.random_checkpoint import SHAPES
from model.schemes import SCHEMES

ROOT = Path(__file__).resolve().parent.parent.parent
BUNDLED = ROOT / "model" / "bundled" / "weights" / "config.json"
BLOCK_SIZE, CHUNK = 256, 512


def config_of(shape: str) -> ModelConfig:
    if shape == "bundled":
        return ModelConfig.from_huggingface(json.loads(BUNDLED.read_text()))
    return ModelConfig.from_huggingface({"model_type": "llama", **SHAPES[shape]})


def random_model(config: ModelConfig, options: argparse.Namespace) -> Llama:
    dtype = getattr(torch, options.dtype)
    pages = cache_format(options.kv_cache_dtype, dtype)
    model = Llama(config, dtype, options.device, options.attention, cache_dtype=pages)
    model.quantize(options.quantization)
    generator = torch.Generator().manual_seed(0)
    for slot in model.slots().values():
        slot.fill(torch.empty(slot.shape, dtype=dtype).normal_(0.0, 0.02, generator=generator))
    model.pack(compiled=not options.no_kernels)
    return model.eval()


class Bench:
    """A model beside a cache that holds ``rows`` contexts, and the batches to run on it."""

    def __init__(self, model: Llama, rows: int, context: int) -> None:
        self.model, self.context = model, context
        self.pages = -(-max(context, 4 * CHUNK) // BLOCK_SIZE)
        num_blocks = 1 + max(rows * -(-context // BLOCK_SIZE), self.pages)
        self.cache = KVCache(model.config, num_blocks, BLOCK_SIZE, model.cache_dtype, model.device)
        tokens = max(rows, CHUNK)
        self.builder = BatchBuilder(tokens, rows, self.pages, BLOCK_SIZE, model.device)

    def decodes(self, rows: int) -> Batch:
        pages = -(-self.context // BLOCK_SIZE)
        tables = [list(range(1 + row * pages, 1 + (row + 1) * pages)) for row in range(rows)]
        return self.builder.build([BatchRow([7], self.context - 1, table, 1) for table in tables])

    def chunk(self, history: int) -> Batch:
        table = list(range(1, 1 + self.pages))
        return self.builder.build([BatchRow([7] * CHUNK, history, table, 1)])

    @torch.inference_mode()
    def seconds(self, batch: Batch, repeats: int) -> float:
        """The best of ``repeats``: the machine's other work only ever adds."""
        best = float("inf")
        for _ in range(repeats):
            start = time.perf_counter()
            self.model.forward(batch, self.cache)
            if self.model.device.type == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - start)
        return best


def profile(bench: Bench, rows: int) -> None:
    from torch.profiler import ProfilerActivity

    batch = bench.decodes(rows)
    bench.seconds(batch, 3)
    with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as record:
        bench.seconds(batch, 3)
    print(record.key_averages().table(sort_by="self_cpu_time_total", row_limit=25))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=["bundled", *SHAPES], default="135m")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--kv-cache-dtype", choices=["auto", *KV_CACHE_DTYPES], default="auto")
    parser.add_argument("--quantization", choices=SCHEMES, default="none")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--no-kernels", action="store_true", help="PyTorch alone")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    model = random_model(config_of(options.shape), options)
    bench = Bench(model, max(options.rows), options.context)
    if options.profile:
        profile(bench, options.rows[-1])
        return
    report(bench, options)


def report(bench: Bench, options: argparse.Namespace) -> None:
    model = bench.model
    print(f"{options.shape}, {options.dtype}, {model.num_parameters / 1e6:.0f} M parameters")
    print(f"{torch.get_num_threads()} threads, {model.path}; quantized: {model.quantization}")
    print(f"{'rows':>5} {'context':>8} {'ms a step':>10} {'tokens/s':>9}   beside it, in turn")
    for rows in options.rows:
        seconds, bandwidth = beside_reads(bench, bench.decodes(rows), options.repeats)
        share = model.read_bytes / bandwidth / seconds
        print(
            f"{rows:5} {options.context:8} {seconds * 1e3:10.1f} {rows / seconds:9.1f}"
            f"   {bandwidth / 1e9:.1f} GB/s read: {share:.0%} of what reading the weights allows"
        )
    for history in (0, CHUNK, 3 * CHUNK):
        seconds, rate = beside_products(bench, bench.chunk(history), max(2, options.repeats // 5))
        share = operations(model.config, history) / rate / seconds
        print(
            f"{CHUNK} prompt tokens after {history:5}: {CHUNK / seconds:9.0f} a second"
            f"   {rate / 1e9:.0f} GFLOP/s in bf16 products: {share:.0%} of that"
        )


def beside_reads(bench: Bench, batch: Batch, repeats: int) -> tuple[float, float]:
    """Medians of a step's seconds and of bytes read a second, measured in turn.

    On a shared machine the one moves with the other, within a second.
    """
    data = torch.rand(1 << 27)
    steps, reads = _in_turn(bench, batch, data.sum, repeats)
    return steps, data.numel() * data.element_size() / reads


def beside_products(bench: Bench, batch: Batch, repeats: int) -> tuple[float, float]:
    """Likewise with operations a second of a product as large as a prompt's."""
    left = torch.randn(CHUNK, 2048, dtype=bench.model.dtype)
    right = torch.randn(8192, 2048, dtype=bench.model.dtype)
    packed = pack_for_onednn(right)  # the fastest there is on a processor
    multiply = (
        partial(F.linear, left, right) if packed is None else partial(packed.multiply, left, None)
    )
    steps, products = _in_turn(bench, batch, multiply, repeats)
    return steps, 2.0 * left.numel() * len(right) / products


def _in_turn(
    bench: Bench, batch: Batch, probe: Callable[[], object], repeats: int
) -> tuple[float, float]:
    """Median seconds of the step and of ``probe``, after one of each that does not count."""
    steps, probes = [], []
    for _ in range(repeats + 1):
        steps.append(bench.seconds(batch, 1))
        start = time.perf_counter()
        probe()
        probes.append(time.perf_counter() - start)
    return median(steps[1:]), median(probes[1:])


def operations(config: ModelConfig, history: int) -> float:
    """Of a chunk: products with the layers' weights, and attention; the head sees one token."""
    queries, keys = (config.head_size * n for n in (config.num_heads, config.num_kv_heads))
    weights = config.hidden_size * (2 * queries + 2 * keys + 3 * config.intermediate_size)
    seen = CHUNK * history + CHUNK * (CHUNK + 1) / 2
    layer = 2.0 * CHUNK * weights + 4.0 * queries * seen
    return config.num_layers * layer + 2.0 * config.hidden_size * config.vocab_size


if __name__ == "__main__":
    main()
