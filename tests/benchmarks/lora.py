"""What adapters cost: the engine's step with adapters in it, against the same step without.

    python -m tests.benchmarks.lora --shape 135m --rows 8 32 --adapters 8 --rank 16

The runner itself (slots, batch, forward, sampling), every row decoding, the adapters dealt out to
the rows in turn. The same model in the same run, with and without, in alternation. Prints also what
the adapters' bytes alone cost at the measured read bandwidth: at few rows nobody can be faster.
"""

from __future__ import annotations

import argparse
import time

import torch

from model.kv_cache import KVCache
from model.llama import Llama
from model.lora import Adapter, LowRank
from model.random_checkpoint import SHAPES
from service.bench.rates import read_bandwidth
from service.engine.adapters import AdapterTable
from service.engine.capacity import Limits
from service.engine.messages import SamplingSettings, Submit
from service.engine.runner import ModelRunner
from service.engine.sequence import Request, Sequence
from service.engine.step import Row, Step
from tests.benchmarks.decode_step import config_of, random_model

BLOCK_SIZE = 256
TARGETS = {
    "all": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "qv": ("q_proj", "v_proj"),
}


def random_adapter(model: Llama, targets: tuple[str, ...], rank: int, seed: int) -> Adapter:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * 0.02).to(model.dtype)

    return Adapter(
        {
            name: LowRank(draw(rank, one.shape[1]), draw(rank, one.shape[0]))
            for name, one in model.projections().items()
            if name.rsplit(".", 1)[-1] in targets
        }
    )


class Bench:
    def __init__(self, model: Llama, options: argparse.Namespace) -> None:
        rows, self.context = max(options.rows), options.context
        pages = -(-self.context // BLOCK_SIZE)
        limits = Limits(rows, max(64, rows), self.context + 1, BLOCK_SIZE)
        cache = KVCache(model.config, 1 + rows * (pages + 1), BLOCK_SIZE, model.dtype, model.device)
        model.make_adapter_slots(options.adapters, max(options.max_rank, options.rank))
        self.runner = ModelRunner(model, cache, limits)
        self.table = AdapterTable(options.adapters, options.adapters)
        self.adapters = []
        for number in range(options.adapters):
            adapter = random_adapter(model, TARGETS[options.targets], options.rank, number)
            version = self.table.add(f"adapter-{number}")
            self.runner.keep_adapter(version, adapter)
            self.adapters.append((version, adapter))

    def step(self, rows: int, share: float) -> Step:
        """``share`` of the rows go through adapters, dealt out in turn."""
        step, pages = Step(0), -(-self.context // BLOCK_SIZE)
        for number in range(rows):
            version = 0
            if number >= rows - round(rows * share):
                version = self.adapters[number % len(self.adapters)][0]
            settings = [SamplingSettings(temperature=0.0)]
            name = self.table.name(version) if version else ""
            prompt = [7] * self.context
            submit = Submit(number, prompt, settings, adapter=name, adapter_version=version)
            sequence = Sequence.start(Request(submit, -1, number, 0.0))
            sequence.block_table = [1 + number * pages + page for page in range(pages)]
            row = Row(sequence, self.context - 1, 1, num_logits=1, choices=sequence.choices)
            step.rows.append(row)
        adapted = [row for row in step.rows if row.sequence.adapter]
        slots, step.fills = self.table.place(row.sequence.adapter for row in adapted)
        for row in adapted:
            row.adapter = slots[row.sequence.adapter]
        step.num_tokens = rows
        step.put_in_order()
        return step

    def seconds(self, steps: list[Step], repeats: int) -> list[float]:
        """The best of each, taken in turn."""
        best = [float("inf")] * len(steps)
        for _ in range(repeats):
            for i, step in enumerate(steps):
                start = time.perf_counter()
                self.runner.run(step)
                best[i] = min(best[i], time.perf_counter() - start)
                step.fills = []
        return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=[*SHAPES], default="135m")
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--max-rank", type=int, default=16)
    parser.add_argument("--targets", choices=[*TARGETS], default="all")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--no-kernels", action="store_true", help="PyTorch alone")
    parser.add_argument("--repeats", type=int, default=20)
    parser.set_defaults(quantization="none", kv_cache_dtype="auto")
    options = parser.parse_args()
    model = random_model(config_of(options.shape), options)
    bench = Bench(model, options)
    size = bench.adapters[0][1].num_bytes
    print(f"{options.shape}, {options.dtype}, {torch.get_num_threads()} threads, {model.path}")
    print(
        f"{options.adapters} adapters of rank {options.rank} on {options.targets}: "
        f"{size / 1e6:.1f} MB each, together {options.adapters * size / model.weight_bytes:.0%} of "
        "the weights"
    )
    bandwidth = read_bandwidth() if options.device == "cpu" else float("inf")
    for rows in options.rows:
        steps = [bench.step(rows, share) for share in (0.0, 1.0, 0.5)]
        plain, whole, half = bench.seconds(steps, options.repeats)
        bound = min(rows, options.adapters) * size / bandwidth
        print(
            f"{rows:3} rows: {plain * 1e3:6.1f} ms without, {whole * 1e3:6.1f} with "
            f"(+{whole / plain - 1:.0%}; their bytes alone +{bound / plain:.0%}), "
            f"{half * 1e3:6.1f} where half of the rows have one (+{half / plain - 1:.0%})"
        )


if __name__ == "__main__":
    main()
