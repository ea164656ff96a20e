"""Memory straight from the system: zeroed, in huge pages, there only once it is written."""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

_HUGE_PAGE = 2 << 20


def zeroed(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """What is large and read whole at each step: a page of 4 KiB a time would miss the TLB."""
    count = math.prod(shape)
    num_bytes = count * dtype.itemsize
    is_large = num_bytes >= _HUGE_PAGE
    memory = mmap.mmap(-1, -(-num_bytes // _HUGE_PAGE) * _HUGE_PAGE if is_large else num_bytes)
    if is_large and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=count).view(*shape)
