"""Keys and values of all layers in pages that sequences own, share and hand on."""

# N pages, K key heads, P tokens a page, D head size

from __future__ import annotations

import contextlib
import math
import mmap

import torch
from torch import Tensor

from model.batch import Batch
from model.config import ModelConfig
from model.parallel import ParallelGroup


class KVCache:
    """``keys[layer]`` and ``values[layer]`` are pages [N, K, P, D].

    Within a page a head's tokens lie side by side, which is what decoding reads.

    Both are views of one storage a layer, so that a step writes them with one operation. Page 0 is
    never given out: padding is written there.
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
        group = group or ParallelGroup()
        self.num_blocks, self.block_size = num_blocks, block_size
        self.num_kv_heads = group.share(config.num_kv_heads, "key heads")
        shape = (2, num_blocks, self.num_kv_heads, block_size, config.head_size)
        # Zeros, not whatever was there: what is masked must still be a number.
        self._layers = [_zeros(shape, dtype, device) for _ in range(config.num_layers)]
        self.keys = [layer[0] for layer in self._layers]
        self.values = [layer[1] for layer in self._layers]

    def write(self, layer: int, keys_values: Tensor, batch: Batch) -> None:
        """Stores [T, 2 K, D], keys before values, at the batch's slots."""
        rows = self._layers[layer].view(-1, keys_values.size(-1))
        rows.index_copy_(0, self._slots(batch), keys_values.reshape(-1, keys_values.size(-1)))

    def _slots(self, batch: Batch) -> Tensor:
        """Where each token's heads go among all rows of D numbers: [T * 2 K]; once a step."""
        key = (KVCache, self.num_blocks)
        slots: Tensor | None = batch.prepared.get(key)
        if slots is None:
            heads = torch.arange(2 * self.num_kv_heads, device=batch.positions.device)
            part, head = heads // self.num_kv_heads, heads % self.num_kv_heads
            pages = part * self.num_blocks + batch.slot_blocks.unsqueeze(1)
            slots = (pages * self.num_kv_heads + head) * self.block_size
            slots = (slots + batch.slot_offsets.unsqueeze(1)).flatten()
            batch.prepared[key] = slots
        return slots

    def copy(self, copies: list[tuple[int, int, int]]) -> None:
        """(source page, target page, first n tokens), one after another in list order."""
        for source, target, tokens in copies:
            for layer in self._layers:
                layer[:, target, :, :tokens] = layer[:, source, :, :tokens]

    def cleanse(self, pages: list[int]) -> None:
        """Takes out what is no number: whoever gets the pages next masks it, with zeros."""
        index = torch.tensor(pages, device=self._layers[0].device)
        for layer in self._layers:
            layer[:, index] = layer[:, index].nan_to_num(0.0, 0.0, 0.0)

    def close(self) -> None:
        """Gives the memory back; the cache cannot be used afterwards."""
        self._layers, self.keys, self.values = [], [], []


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Zeroed pages; on a CPU the system gives them at first use, so a large cache costs nothing."""
    if torch.device(device).type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def bytes_per_block(
    config: ModelConfig, block_size: int, dtype: torch.dtype, group: ParallelGroup | None = None
) -> int:
    """Of one page in all layers, keys and values, on one rank."""
    heads = (group or ParallelGroup()).share(config.num_kv_heads, "key heads")
    return 2 * config.num_layers * heads * block_size * config.head_size * dtype.itemsize
