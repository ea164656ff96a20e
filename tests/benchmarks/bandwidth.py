"""The machine's memory read bandwidth, the bound of decoding at one stream.

python -m tests.benchmarks.bandwidth
"""

from __future__ import annotations

import time


def read_bandwidth(gigabytes: float = 1.0, repeats: int = 5) -> float:
    """Bytes a second all threads together read from memory: the best of ``repeats`` sums."""
    import torch

    data = torch.ones(int(gigabytes * (1 << 30)) // 4, dtype=torch.float32)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        data.sum()
        best = min(best, time.perf_counter() - start)
    return data.numel() * data.element_size() / best


if __name__ == "__main__":
    print(f"{read_bandwidth() / 1e9:.1f} GB/s read")
