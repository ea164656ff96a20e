"""Keys and values of all layers in pages that sequences own, share and hand on."""

# N pages, K key heads, P tokens a page, D head size

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from model.batch import Batch
from model.config import ModelConfig
from model.kv_format import dequantize, quantize, scale_bytes
from model.memory import zeroed
from model.parallel import ParallelGroup


class KVCache:
    """``keys[layer]`` and ``values[layer]`` are pages [N, K, P, D].

    Within a page a head's tokens lie side by side, which is what decoding reads.

    Both are views of one storage a layer, so that a step writes them with one operation. Page 0 is
    never given out: padding is written there. Pages of int8 have ``scales[layer]`` [2, N, K, P]
    float32 beside them, keys' before values'; else ``scales`` is empty.
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
        self.num_blocks, self.block_size, self.dtype = num_blocks, block_size, dtype
        self.num_kv_heads = group.share(config.num_kv_heads, "key heads")
        shape = (2, num_blocks, self.num_kv_heads, block_size, config.head_size)
        # Zeros, not whatever was there: what is masked must still be a number.
        self._layers = [zeros(shape, dtype, device) for _ in range(config.num_layers)]
        self.keys = [layer[0] for layer in self._layers]
        self.values = [layer[1] for layer in self._layers]
        self.scales: list[Tensor] = []
        if scale_bytes(dtype):
            self.scales = [
                zeros(shape[:-1], torch.float32, device) for _ in range(config.num_layers)
            ]
        self.kept: dict[Any, Any] = {}  # what an attention backend needs beside it in every step

    @property
    def layers(self) -> list[Tensor]:
        """Each layer's storage, [2, N, K, P, D]: keys, then values."""
        return self._layers

    def write(self, layer: int, keys_values: Tensor, batch: Batch) -> None:
        """Stores [T, 2 K, D], keys before values, at the batch's slots."""
        stored, scales = quantize(keys_values, self.dtype)
        rows, width, slots = self._layers[layer], keys_values.size(-1), self._slots(batch)
        as_bytes(rows).view(-1, width).index_copy_(0, slots, as_bytes(stored).reshape(-1, width))
        if scales is not None:
            self.scales[layer].view(-1).index_copy_(0, slots, scales.flatten())

    def read(self, layer: int, pages: list[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values of some pages as numbers of ``dtype``, [n, K, P, D] each."""
        index = torch.tensor(pages, device=self._layers[layer].device)
        stored = self._layers[layer][:, index]
        scales = self.scales[layer][:, index] if self.scales else None
        keys, values = dequantize(stored, scales, dtype)
        return keys, values

    def scales_of(self, layer: int) -> Tensor | None:
        """[2, N, K, P] float32, or None where the pages need none."""
        return self.scales[layer] if self.scales else None

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
            for layer in (*self._layers, *self.scales):
                layer[:, target, :, :tokens] = layer[:, source, :, :tokens]

    def cleanse(self, pages: list[int]) -> None:
        """What is no number in these pages becomes 0: whoever masks it multiplies it with zeros."""
        index = torch.tensor(pages, device=self.keys[0].device)
        for pool in (*self._layers, *self.scales):
            if pool.dtype == torch.float8_e4m3fn:
                codes = as_bytes(pool)
                own = codes[:, index]
                codes[:, index] = own.masked_fill((own & 0x7F) == 0x7F, 0)
            elif pool.is_floating_point():
                pool[:, index] = pool[:, index].nan_to_num(0.0, 0.0, 0.0)

    def close(self) -> None:
        """Gives the memory back; the cache cannot be used afterwards."""
        self._layers, self.keys, self.values, self.scales = [], [], [], []
        self.kept.clear()


def as_bytes(pages: Tensor) -> Tensor:
    """fp8 seen as bytes, which every operation of PyTorch can move; others as they are."""
    return pages.view(torch.uint8) if pages.dtype == torch.float8_e4m3fn else pages


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Zeroed pages; on a CPU the system gives them at first use, so a large cache costs nothing."""
    if torch.device(device).type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return zeroed(shape, dtype)


def bytes_per_block(
    config: ModelConfig, block_size: int, dtype: torch.dtype, group: ParallelGroup | None = None
) -> int:
    """Of one page in all layers, keys and values and their scales, on one rank."""
    heads = (group or ParallelGroup()).share(config.num_kv_heads, "key heads")
    token_bytes = config.head_size * dtype.itemsize + scale_bytes(dtype)
    return 2 * config.num_layers * heads * block_size * token_bytes
