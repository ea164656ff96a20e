"""The network through the compiled kernels: the same network, five calls a layer.

Every row of a step goes this way, decoding tokens and chunks of prompts together: the weights are
read once a step, from their one packed copy. What a token gets is the same bits whatever it is
batched with and however its prompt was cut.

A layer's calls read and write buffers that stay where they are, so they are prepared once, for as
many tokens as a step has had so far.
"""

# T tokens, R rows of logits, V vocabulary

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from model.adapters import AdapterRows
from model.batch import Batch
from model.kernels import (
    CACHE_KINDS,
    MAX_HEAD_SIZE,
    Kernels,
    KernelWeight,
    PagedRows,
    PreparedAttention,
    PreparedLinear,
    StepRows,
    kernel_status,
    load_kernels,
)
from model.kernels.packing import PANEL, can_pack
from model.kv_cache import KVCache
from model.kv_format import format_name
from model.layers import Linear, RMSNorm

if TYPE_CHECKING:
    from model.kernels.lora import PreparedAdapters
    from model.llama import Layer, Llama, Taps

AddAdapters: TypeAlias = Callable[[int, AdapterRows], bool]
RunLayer: TypeAlias = Callable[[int, AdapterRows | None], None]

_LEAST_TOKENS = 32  # a plan is made for at least so many


class CompiledNetwork:
    """The forward pass of one network on a CPU whose layers hold packed weights."""

    def __init__(self, model: Llama, kernels: Kernels) -> None:
        self._model, self._kernels = model, kernels
        self._plan: _Plan | None = None
        self._head: list[_Head] = [_Head(model, kernels), _Head(model, kernels)]

    def forward(self, batch: Batch, cache: KVCache, taps: Taps | None = None) -> Tensor:
        """Logits [R, V] float32, as PyTorch gives them; valid until the next call but one."""
        model, count = self._model, batch.num_tokens
        plan = self._plan_for(count, cache)
        x = plan.x[:count]
        x.copy_(model.embedding(batch.token_ids))
        plan.step.set(_paged_rows(model, batch))
        _tap(taps, 0, x)
        for index, layer in enumerate(plan.layers):
            layer(count, batch.adapters)
            _tap(taps, index + 1, x)
        if batch.num_logits != count:
            x = x.index_select(0, batch.logit_rows)
        return self.logits(x)

    def plan_anew(self) -> None:
        """Layers have got slots for adapters: their calls are prepared with them."""
        self._plan = None

    def logits(self, x: Tensor) -> Tensor:
        """The head over its norm: [R, hidden] -> [R, V] float32, in one of two buffers in turn."""
        self._head.reverse()
        return self._head[0](x)

    def _plan_for(self, num_tokens: int, cache: KVCache) -> _Plan:
        plan = self._plan
        if plan is None or plan.cache is not cache or len(plan.x) < num_tokens:
            enough = max(_LEAST_TOKENS, 1 << (num_tokens - 1).bit_length())
            plan = self._plan = _Plan(self._model, self._kernels, cache, enough)
        return plan


class _Plan:
    """Buffers for so many tokens, and every layer's calls on them."""

    def __init__(self, model: Llama, kernels: Kernels, cache: KVCache, num_tokens: int) -> None:
        config = model.config
        self.cache = cache

        def buffer(width: int) -> Tensor:
            return torch.empty(num_tokens, width, dtype=torch.bfloat16)

        heads, kv_heads, size = config.num_heads, config.num_kv_heads, config.head_size
        self.x, self.qkv = buffer(config.hidden_size), buffer((heads + 2 * kv_heads) * size)
        self.mixed, self.inner = buffer(heads * size), buffer(config.intermediate_size)
        has_slots = any(one.linear.adapters for one in model.projections().values())
        # What adapters add to gate and up, before silu.
        self.more = buffer(2 * config.intermediate_size if has_slots else 0)
        self.step = StepRows(kernels, heads, kv_heads, size)
        self.layers = [
            self._layer(layer, kernels, config.norm_eps)  # type: ignore[arg-type]
            for layer in model.layers
        ]

    def _layer(self, layer: Layer, kernels: Kernels, eps: float) -> RunLayer:
        attention, mlp, cache = layer.attention, layer.feed_forward, self.cache

        def linear(module: Linear, x: Tensor, out: Tensor, **more: object) -> PreparedLinear:
            weight = module.packed
            assert isinstance(weight, KernelWeight)
            return PreparedLinear(kernels, weight, x, out, bias=module.bias, eps=eps, **more)  # type: ignore[arg-type]

        scales = cache.scales_of(attention.index)
        norms = layer.attention_norm.weight, layer.feed_forward_norm.weight
        qkv = linear(attention.qkv, self.x, self.qkv, norm=norms[0])
        attend = PreparedAttention(
            kernels,
            self.step,
            self.qkv,
            self.mixed,
            cache.keys[attention.index],
            cache.values[attention.index],
            scale=attention.scale,
            window=attention.window,
            q_norm=None if attention.q_norm is None else attention.q_norm.weight,
            k_norm=None if attention.k_norm is None else attention.k_norm.weight,
            eps=eps,
            key_scales=None if scales is None else scales[0],
            value_scales=None if scales is None else scales[1],
        )
        output = linear(attention.output, self.mixed, self.x, adds=True)
        gate_up = linear(mlp.gate_up, self.x, self.inner, norm=norms[1], gates=True)
        down = linear(mlp.down, self.inner, self.x, adds=True)

        add_qkv, add_output, find_more, add_down = self._adapters(layer)

        def run(num_tokens: int, adapters: AdapterRows | None) -> None:
            qkv(num_tokens)
            if adapters is not None:
                add_qkv(num_tokens, adapters)
            attend()
            output(num_tokens)
            if adapters is not None:
                add_output(num_tokens, adapters)
            is_adapted = adapters is not None and find_more(num_tokens, adapters)
            gate_up(num_tokens, self.more if is_adapted else None)
            down(num_tokens)
            if adapters is not None:
                add_down(num_tokens, adapters)

        return run

    def _adapters(self, layer: Layer) -> tuple[AddAdapters, AddAdapters, AddAdapters, AddAdapters]:
        """What is added after qkv, after the output, to gate and up, and after down."""
        attention, mlp = layer.attention, layer.feed_forward
        if attention.qkv.adapters is None:
            return _add_nothing, _add_nothing, _add_nothing, _add_nothing
        return (
            _prepared(attention.qkv, self.x, self.qkv, layer.attention_norm),
            _prepared(attention.output, self.mixed, self.x),
            _prepared(mlp.gate_up, self.x, self.more, layer.feed_forward_norm, clears=True),
            _prepared(mlp.down, self.inner, self.x),
        )


def _add_nothing(num_tokens: int, adapters: AdapterRows) -> bool:
    return False


def _prepared(
    linear: Linear, x: Tensor, out: Tensor, norm: RMSNorm | None = None, *, clears: bool = False
) -> PreparedAdapters:
    assert linear.adapters is not None, "all layers have slots, or none"
    return linear.adapters.prepare(x, out, norm, clears=clears)


class _Head:
    """Norm and head into a buffer of its own: a large one taken anew costs more than it should."""

    def __init__(self, model: Llama, kernels: Kernels) -> None:
        self._model, self._kernels = model, kernels
        self._out = torch.empty(0, model.config.vocab_size)

    def __call__(self, x: Tensor) -> Tensor:
        if len(x) > len(self._out):
            self._out = torch.empty(len(x), self._model.config.vocab_size)
        out, weight = self._out[: len(x)], self._model.head.packed
        assert isinstance(weight, KernelWeight)
        if len(x):
            norm, eps = self._model.norm.weight, self._model.config.norm_eps
            PreparedLinear(self._kernels, weight, x.contiguous(), out, norm=norm, eps=eps)(len(x))
        return out


def _paged_rows(model: Llama, batch: Batch) -> PagedRows:
    cosines, sines = model.rope.angles(batch.positions)
    return PagedRows(
        cosines.contiguous(),
        sines.contiguous(),
        batch.block_tables.contiguous(),
        batch.context_lengths,
        batch.query_starts,
        batch.num_decodes,
        max(batch.contexts[: batch.num_decodes], default=0),
    )


def _tap(taps: Taps | None, layer: int, x: Tensor) -> None:
    """Taps may keep what they are shown, and the next layer adds in place: they get a copy."""
    if taps is not None and (replaced := taps(layer, x.clone())) is not None:
        x.copy_(replaced)


def compile_network(model: Llama) -> tuple[CompiledNetwork | None, str]:
    """The compiled path with all weights packed for it, or None; in words which path and why."""
    if model.device.type != "cpu" or model.attention != "cpu":
        return None, model.attention
    if model.dtype != torch.bfloat16:
        return None, "cpu (PyTorch: the compiled kernels take bf16)"
    if model.cache_dtype not in CACHE_KINDS:
        name = format_name(model.cache_dtype)
        return None, f"cpu (PyTorch: the compiled kernels read no {name} pages)"
    if not _has_kernel_shape(model):
        return None, "cpu (PyTorch: the compiled kernels do not take this shape)"
    kernels = load_kernels()
    usable, why = kernel_status()
    if kernels is None or not usable:
        return None, f"cpu (PyTorch: {why})"
    for module in model.modules():
        if isinstance(module, Linear):
            if not can_pack(module.held):
                module.widen()
            module.pack(kernels.pack)
    return CompiledNetwork(model, kernels), f"cpu with {why}"


def _has_kernel_shape(model: Llama) -> bool:
    config = model.config
    size, widths = config.head_size, (config.hidden_size, config.num_heads * config.head_size)
    fits = size % 16 == 0 and size <= MAX_HEAD_SIZE and all(width % 2 == 0 for width in widths)
    return fits and model.group.size == 1 and config.intermediate_size % PANEL == 0
