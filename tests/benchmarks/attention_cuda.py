"""Paged attention on a GPU, against what its memory allows and against PyTorch's own.

    python -m tests.benchmarks.attention_cuda [--heads 32] [--kv-heads 8] [--head-size 128]

Decodes are given as the share of the device's copy bandwidth that reading the keys and values once
takes; prompt chunks as TFLOP/s. The peer is SDPA over contiguous keys, which no server has: pages
gathered for nothing. Times are medians of CUDA events over many launches, in bfloat16.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from model import attention_cuda
from model.batch import Batch, BatchBuilder, BatchRow

PAGE = 256
DECODES = [(1, 1_024), (1, 32_768), (8, 1_024), (8, 8_192), (32, 1_024), (32, 4_096), (128, 1_024)]
CHUNKS = [(512, 512), (2_048, 2_048), (8_192, 8_192), (512, 8_192)]  # queries, context


@dataclass(frozen=True)
class Shape:
    heads: int
    kv_heads: int
    head_size: int


def main() -> None:
    shape = read_shape()
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: {shape}")
    print(f"device copy: {bandwidth / 1e12:.2f} TB/s read and written")
    ready = ready_backends(shape)
    print(f"{'':34}" + "".join(f"{name:>24}" for name in [*ready, "sdpa, contiguous"]))
    for rows, context in DECODES:
        num_bytes = 2 * rows * context * shape.kv_heads * shape.head_size * 2
        times = measure(shape, [(1, context)] * rows, ready)
        shares = [f"{t * 1e6:9.1f} us {num_bytes / t / bandwidth:6.0%}" for t in times]
        print(f"decode {rows:4} rows, context {context:6}  " + "".join(f"{s:>24}" for s in shares))
    for queries, context in CHUNKS:
        pairs = queries * context - queries * (queries - 1) / 2
        flops = 4 * pairs * shape.heads * shape.head_size
        times = measure(shape, [(queries, context)], ready)
        rates = [f"{t * 1e6:9.1f} us {flops / t / 1e12:6.1f} TF" for t in times]
        print(f"chunk {queries:5} of context {context:6}    " + "".join(f"{s:>24}" for s in rates))


def ready_backends(shape: Shape) -> dict[str, attention_cuda.Attend]:
    ready: dict[str, attention_cuda.Attend] = {}
    if attention_cuda.triton_available():
        ready["triton"] = attention_cuda.triton_attention
    if attention_cuda.varlen_available():
        ready["varlen"] = attention_cuda.varlen_attention
    refusal = attention_cuda.flashinfer_refusal(torch.bfloat16, shape.head_size)
    if refusal is None:
        from model.attention_flashinfer import FlashInfer

        ready["flashinfer"] = FlashInfer(torch.device("cuda")).attend
    else:
        print(f"without flashinfer: {refusal}")
    return ready


def read_shape() -> Shape:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-size", type=int, default=128)
    return Shape(**vars(parser.parse_args()))


def measure(
    shape: Shape, rows: list[tuple[int, int]], backends: dict[str, attention_cuda.Attend]
) -> list[float]:
    """Seconds of each backend, then of SDPA."""
    batch, pages, q = paged_inputs(shape, rows)
    scale = shape.head_size**-0.5
    times = [
        seconds(lambda a=attend: a(q, pages[0], pages[1], batch, scale, None))
        for attend in backends.values()
    ]
    (queries, context), num_rows = rows[0], len(rows)
    keys = torch.randn(
        2, num_rows, shape.kv_heads, context, shape.head_size, device="cuda", dtype=q.dtype
    )
    own = q.view(num_rows, queries, shape.heads, shape.head_size).transpose(1, 2)
    mask = None
    if queries > 1:
        mask = torch.ones(queries, context, dtype=torch.bool, device="cuda").tril(context - queries)
    whole = queries == context
    times.append(
        seconds(
            lambda: F.scaled_dot_product_attention(
                own,
                keys[0],
                keys[1],
                attn_mask=None if whole else mask,
                is_causal=whole and queries > 1,
                enable_gqa=True,
            )
        )
    )
    return times


def paged_inputs(shape: Shape, rows: list[tuple[int, int]]) -> tuple[Batch, Tensor, Tensor]:
    """A batch whose pages lie in random order, the pages [2, N, K, P, D], the queries."""
    needed = [-(-context // PAGE) for _, context in rows]
    numbers = (torch.randperm(sum(needed)) + 1).tolist()
    tables = [[numbers.pop() for _ in range(count)] for count in needed]
    num_tokens = sum(queries for queries, _ in rows)
    builder = BatchBuilder(num_tokens, len(rows), max(needed), PAGE, "cuda")
    batch = builder.build(
        [
            BatchRow([0] * queries, context - queries, table, num_logits=1)
            for (queries, context), table in zip(rows, tables, strict=True)
        ]
    )
    like = {"device": "cuda", "dtype": torch.bfloat16}
    pages = torch.randn(2, sum(needed) + 1, shape.kv_heads, PAGE, shape.head_size, **like)
    return batch, pages, torch.randn(num_tokens, shape.heads, shape.head_size, **like)


def seconds(work: Callable[[], Tensor], repeats: int = 50) -> float:
    """Median device time of one launch, replayed from a graph: the host's part is left out."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return median(times)


def copy_bandwidth() -> float:
    """Bytes a second, read and written together, of copying one GiB."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds(lambda: target.copy_(source))


if __name__ == "__main__":
    main()
