"""What this machine can do at most: bytes read a second, bfloat16 operations a second.

    python -m service.bench.rates [--device cuda]

Measured in the run whose figures they are held against: shared machines change by the minute.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec
from msgspec import Struct

if TYPE_CHECKING:
    import torch

GIB = 1 << 30
MATRIX = {"cpu": 2048, "cuda": 8192}  # rows, columns and depth


class Rates(Struct, frozen=True):
    read_bytes_per_second: float
    matrix_operations_per_second: float  # bfloat16; a multiplication and an addition are two


def measure(device: str = "cpu") -> Rates:
    return Rates(read_bandwidth(device=device), matrix_rate(device))


def read_bandwidth(gigabytes: float = 1.0, repeats: int = 5, device: str = "cpu") -> float:
    """Bytes a second all threads together read from memory: the best of ``repeats`` sums."""
    import torch

    data = torch.ones(int(gigabytes * GIB) // 4, dtype=torch.float32, device=device)
    return data.numel() * data.element_size() / _seconds(data.sum, repeats, data.device)


def matrix_rate(device: str = "cpu", repeats: int = 5) -> float:
    """Of a square product, the best of ``repeats``."""
    import torch

    size = MATRIX[torch.device(device).type]
    left, right = torch.ones(2, size, size, dtype=torch.bfloat16, device=device)
    return 2.0 * size**3 / _seconds(lambda: left @ right, repeats, left.device)


def _seconds(work: Callable[[], object], repeats: int, device: torch.device) -> float:
    """The best of ``repeats`` after one that is not counted: others on the machine only add."""
    import torch

    best = float("inf")
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true", help="one line, for programs")
    options = parser.parse_args()
    rates = measure(options.device)
    if options.json:
        print(msgspec.json.encode(rates).decode())
    else:
        print(describe(rates))


def describe(rates: Rates) -> str:
    read, matrix = rates.read_bytes_per_second / 1e9, rates.matrix_operations_per_second / 1e9
    return f"memory read {read:.1f} GB/s, bfloat16 matrix product {matrix:.0f} GFLOP/s"


if __name__ == "__main__":
    main()
