"""Decode steps through the compiled kernels: the same network, four passes a layer.

Serves rows of one token; prompt chunks go through PyTorch, also within one step: the decoding rows
beside a chunk cost one more read of the weights and gain a row's independence of its neighbours (a
row's result is the same bits whatever it is batched with). The weights stay row-major, one copy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.batch import Batch
from model.kernels import MAX_HEAD_SIZE, MAX_ROWS, Kernels, PagedRows, kernel_status, load_kernels
from model.kv_cache import KVCache
from model.kv_format import format_name
from model.llama import Layer, Llama


class CompiledDecode:
    """The decode path of one network on a CPU."""

    def __init__(self, model: Llama, kernels: Kernels) -> None:
        self._model, self._kernels = model, kernels
        self._eps = model.config.norm_eps

    def forward(self, batch: Batch, cache: KVCache) -> Tensor:
        """Logits [R, V] float32 of rows of one token each, as PyTorch gives them to rounding."""
        count = batch.num_tokens
        if count <= MAX_ROWS:
            return self._forward(batch, cache)
        parts = (batch.rows(i, min(i + MAX_ROWS, count)) for i in range(0, count, MAX_ROWS))
        return torch.cat([self._forward(part, cache) for part in parts])

    def _forward(self, batch: Batch, cache: KVCache) -> Tensor:
        model = self._model
        x = model.embedding(batch.token_ids)  # a fresh tensor: the layers add to it in place
        cosines, sines = model.rope.angles(batch.positions)
        tables, longest = batch.block_tables.contiguous(), max(batch.contexts)
        rows = PagedRows(
            cosines.contiguous(), sines.contiguous(), tables, batch.context_lengths, longest
        )
        for layer in model.layers:
            assert isinstance(layer, Layer)
            self._layer(layer, x, rows, cache)
        if batch.num_logits != batch.num_tokens:
            x = x.index_select(0, batch.logit_rows)
        if x.size(0) == 0:
            return torch.empty(0, model.config.vocab_size)
        norm, head = model.norm.weight, model.head.weight
        return self._kernels.rms_linear(x, norm, head, None, self._eps, torch.float32)

    def _layer(self, layer: Layer, x: Tensor, rows: PagedRows, cache: KVCache) -> None:
        kernels, attention, mlp = self._kernels, layer.attention, layer.feed_forward
        qkv, output, gate_up, down = attention.qkv, attention.output, mlp.gate_up, mlp.down
        mixed = kernels.paged_attention(
            kernels.rms_linear(x, layer.attention_norm.weight, qkv.weight, qkv.bias, self._eps),
            cache.keys[attention.index],
            cache.values[attention.index],
            rows,
            scale=attention.scale,
            window=attention.window,
            q_norm=None if attention.q_norm is None else attention.q_norm.weight,
            k_norm=None if attention.k_norm is None else attention.k_norm.weight,
            eps=self._eps,
        )
        kernels.linear_add(mixed, output.weight, output.bias, x)
        norm = layer.feed_forward_norm.weight
        inner = kernels.rms_gate_up(x, norm, gate_up.weight, gate_up.bias, self._eps)
        kernels.linear_add(inner, down.weight, down.bias, x)


def compile_decode(model: Llama) -> tuple[CompiledDecode | None, str]:
    """The compiled path, or None; and in words which path decodes and why."""
    size = model.config.head_size
    if model.device.type != "cpu" or model.attention != "cpu":
        return None, model.attention
    if model.dtype != torch.bfloat16:
        return None, "cpu (PyTorch: the compiled kernels take bf16 weights)"
    if model.cache_dtype != torch.bfloat16:
        name = format_name(model.cache_dtype)
        return None, f"cpu (PyTorch: the compiled kernels read no {name} pages)"
    if model.group.size > 1 or size % 16 or size > MAX_HEAD_SIZE:
        return None, "cpu (PyTorch: the compiled kernels do not take this shape)"
    kernels = load_kernels()
    usable, why = kernel_status()
    if kernels is None or not usable:
        return None, f"cpu (PyTorch: {why})"
    return CompiledDecode(model, kernels), f"cpu with {why}"
