"""Keys and values in pages: [num_blocks, num_kv_heads, block_size, head_size], one pair a layer."""

from __future__ import annotations

import torch
from torch import Tensor

from model.batch import Batch
from model.config import ModelConfig
from model.parallel import ParallelGroup


def bytes_per_block(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    """Memory of one page over all layers, keys and values."""
    values = config.num_layers * 2 * config.num_kv_heads * block_size * config.head_size
    return values * dtype.itemsize


class KVCache:
    """Head-major pages: a decoding row reads each head's keys as one contiguous run.

    Block 0 is never given out; padding writes there. Memory is zeroed: whatever attention reads
    past a sequence's end is masked, but must not be NaN.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device | str,
        group: ParallelGroup | None = None,
    ) -> None:
        kv_heads = (group or ParallelGroup()).share(config.num_kv_heads)
        shape = (num_blocks, kv_heads, block_size, config.head_size)
        self.num_blocks, self.block_size = num_blocks, block_size
        self.keys = [
            torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)
        ]
        self.values = [
            torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)
        ]

    def write(self, layer: int, k: Tensor, v: Tensor, batch: Batch) -> None:
        """Store k and v, [T, KV, D], of the batch's tokens."""
        self.keys[layer][batch.slot_blocks, :, batch.slot_offsets] = k
        self.values[layer][batch.slot_blocks, :, batch.slot_offsets] = v

    def copy(self, copies: list[tuple[int, int, int]]) -> None:
        """(source block, target block, first tokens), in order."""
        for pages in (*self.keys, *self.values):
            for source, target, count in copies:
                pages[target, :, :count] = pages[source, :, :count]

    def close(self) -> None:
        """Give the memory back now."""
        self.keys.clear()
        self.values.clear()
