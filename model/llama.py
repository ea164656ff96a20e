"""The network: tokens in, logits out, keys and values into the cache."""

# T tokens, H query heads, K key heads, D head size, R rows of logits, V vocabulary

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.adapters import AdapterRows
from model.attention import attention, choose_backend
from model.batch import Batch
from model.config import ModelConfig
from model.kv_cache import KVCache
from model.layers import (
    Embedding,
    Linear,
    Packed,
    Projection,
    RMSNorm,
    WeightSlot,
    pack_for_onednn,
    projections_of,
)
from model.lora import Adapter, LowRank
from model.parallel import ParallelGroup
from model.products import pack_quantized
from model.rope import Rope, rotate, spread
from model.schemes import BITS, AnyWeight, Quantized, check_scheme

if TYPE_CHECKING:
    from model.compiled import CompiledNetwork

__all__ = ["Llama", "Taps", "WeightSlot"]

# Called before the first layer (0) and after each one (1 ..) with the residual stream [T, hidden];
# what it returns, if anything, takes the stream's place.
Taps: TypeAlias = Callable[[int, Tensor], Tensor | None]
Angles: TypeAlias = tuple[Tensor, Tensor]

# Parts of fused layers, as checkpoints name them.
QKV = tuple(f"self_attn.{name}_proj" for name in "qkv")
OUTPUT = ("self_attn.o_proj",)
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
DOWN = ("mlp.down_proj",)


class Llama(nn.Module):
    """Built without memory; filled through ``slots``, then packed, then called."""

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        attention: str = "auto",
        group: ParallelGroup | None = None,
        cache_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config, self.dtype, self.device = config, dtype, torch.device(device)
        self.cache_dtype = cache_dtype or dtype  # of the pages it will be run over
        self.group = group or ParallelGroup()
        self.attention = choose_backend(
            attention, self.device, dtype, config.head_size, self.cache_dtype
        )
        make = _Maker(config, dtype, self.device, self.group, self.attention)
        self.embedding = Embedding(config.vocab_size, config.hidden_size, dtype, self.device)
        self.layers = nn.ModuleList(Layer(index, make) for index in range(config.num_layers))
        self.norm = make.norm(config.hidden_size)
        self.is_head_split = not config.tie_embeddings and config.vocab_size % self.group.size == 0
        self.head = make.linear(
            config.hidden_size, [config.vocab_size], is_split=self.is_head_split
        )
        self.rope = Rope(config.rope, config.head_size, self.device)
        self.compiled: CompiledNetwork | None = None  # settled by ``pack``
        self.path = self.attention  # in words, for the banner

    def forward(self, batch: Batch, cache: KVCache, taps: Taps | None = None) -> Tensor:
        """Logits [R, V] float32 of the rows the batch asks for, in its order."""
        if self.compiled is not None:
            return self.compiled.forward(batch, cache, taps)
        return self._forward(batch, cache, taps)

    def _forward(self, batch: Batch, cache: KVCache, taps: Taps | None) -> Tensor:
        batch.prepared.clear()
        x = self.embedding(batch.token_ids)
        angles = self.angles(batch.positions)
        x = _tapped(taps, 0, x)
        for index, layer in enumerate(self.layers):
            x = layer(x, angles, batch, cache)
            x = _tapped(taps, index + 1, x)
        if batch.num_logits != batch.num_tokens:
            x = x.index_select(0, batch.logit_rows)
        return self.logits(x)

    def angles(self, positions: Tensor) -> Angles:
        """[T] -> what every layer turns queries and keys by."""
        return spread(*self.rope.angles(positions))

    def logits(self, x: Tensor) -> Tensor:
        """The residual stream behind the last layer [R, hidden] -> [R, V] float32."""
        if self.compiled is not None:
            return self.compiled.logits(x)
        logits: Tensor = self.head(self.norm(x))
        if self.is_head_split:
            logits = self.group.gather_columns(logits)
        return logits.float()

    def states(self, x: Tensor) -> Tensor:
        """The residual stream behind the last layer [n, hidden] -> what the head sees, float32."""
        states: Tensor = self.norm(x)
        return states.float()

    def slots(self) -> dict[str, WeightSlot]:
        """Everything a checkpoint must hold, by its Hugging Face name."""
        found = {"model.embed_tokens.weight": self._embedding_slot()}
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, Layer)
            prefix = f"model.layers.{index}."
            found |= {prefix + name: slot for name, slot in layer.slots().items()}
        found["model.norm.weight"] = self.norm.slot()
        if not self.config.tie_embeddings:
            found |= self.head.slots(["lm_head"], has_bias=False)
        return found

    def projections(self) -> dict[str, Projection]:
        """Every linear layer an adapter may adapt, by its Hugging Face name."""
        found = {}
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, Layer)
            for name, projection in layer.projections().items():
                found[f"model.layers.{index}.{name}"] = projection
        return found

    def make_adapter_slots(self, num_slots: int, max_rank: int) -> None:
        """Room for so many adapters in one step; takes its memory now."""
        for linear in {projection.linear for projection in self.projections().values()}:
            linear.make_adapter_slots(num_slots, max_rank, self.dtype)
        if self.compiled is not None:
            self.compiled.plan_anew()

    @property
    def serves_adapters_by_token(self) -> bool:
        """Whether there are slots, and no launch depends on which of them a step goes through."""
        held = [projection.linear.adapters for projection in self.projections().values()]
        return all(slots is not None and slots.serves_by_token for slots in held)

    def fill_adapter_slot(self, slot: int, adapter: Adapter) -> None:
        """What the slot held before is gone; steps queued on the device still see it."""
        by_linear: dict[Linear, dict[int, LowRank]] = {}
        for name, (linear, part) in self.projections().items():
            own = by_linear.setdefault(linear, {})
            if name in adapter.weights:
                own[part] = adapter.weights[name]
        for linear, weights in by_linear.items():
            linear.fill_adapter_slot(slot, weights)

    def _embedding_slot(self) -> WeightSlot:
        slot = self.embedding.slot()
        return WeightSlot(slot.shape, self._fill_tied) if self.config.tie_embeddings else slot

    def _fill_tied(self, tensor: AnyWeight) -> None:
        """The embedding is dense; the head is the same tensor, or a quantized copy of it."""
        self.embedding.slot().fill(tensor)
        head = self.embedding.weight if self.head.scheme == "none" else self.head.kept(tensor)
        if isinstance(head, Tensor):
            self.head.weight = self.embedding.weight
        else:
            self.head.slots(["lm_head"], has_bias=False)["lm_head.weight"].fill(head)

    def quantize(self, scheme: str) -> None:
        """How linear layers hold what they are filled with from now on (schemes.SCHEMES).

        The head, which every step reads whole and whose errors no later layer evens out, keeps 8
        bits. Raises ValueError for a scheme that is not known or not for this device.
        """
        check_scheme(scheme, self.device)
        for module in self._linears():
            module.scheme = scheme
        if scheme in BITS:
            self.head.scheme = "int8"

    def _linears(self) -> list[Linear]:
        return [module for module in self.modules() if isinstance(module, Linear)]

    def pack(self, *, compiled: bool = True) -> None:
        """Settles how the weights are read, once every slot is filled.

        One packed copy for the kernels, or one re-laid for oneDNN; what cannot be packed stays.
        """
        from model.compiled import compile_network

        if compiled:
            self.compiled, self.path = compile_network(self)
        if self.compiled is not None:
            self._share_packed_head()
            return
        for module in self._linears():
            module.pack(self._pack_for_pytorch)
            if module.quantized is not None:
                module.widen_if_slow()
                module.pack(self._pack_for_pytorch)

    def _pack_for_pytorch(self, weight: AnyWeight) -> Packed | None:
        if isinstance(weight, Quantized):
            return pack_quantized(weight, self.dtype)
        return pack_for_onednn(weight)

    def _share_packed_head(self) -> None:
        """A tied embedding looks up the head's panels: one copy of the largest matrix."""
        from model.kernels import KernelWeight

        head = self.head.packed
        if self._is_head_shared and isinstance(head, KernelWeight):
            self.embedding.look_up_in(head.panels.rows)

    @property
    def num_parameters(self) -> int:
        """Of the whole network, all ranks together; tied embeddings count once."""
        return sum(math.prod(slot.shape) for slot in self.slots().values())

    @property
    def weight_bytes(self) -> int:
        """What all weights take, on one rank."""
        embedding = self.embedding.weight.numel() * self.dtype.itemsize
        return self.read_bytes + (0 if self._is_head_shared else embedding)

    @property
    def read_bytes(self) -> int:
        """What a decode step reads of them: all but the embedding's other rows."""
        norms = sum(m.weight.numel() for m in self.modules() if isinstance(m, RMSNorm))
        linears = sum(linear.num_bytes for linear in self._linears())
        return linears + norms * self.dtype.itemsize

    @property
    def _is_head_shared(self) -> bool:
        return self.config.tie_embeddings and not self.head.quantized_as

    @property
    def quantization(self) -> str:
        """In words: "int4 weights, groups of 32; head: int8 weights, groups of 64", or "none"."""
        layers = [linear for linear in self._linears() if linear is not self.head]
        kinds = Counter(linear.quantized_as for linear in layers)
        dense, head = kinds.pop("", 0), self.head.quantized_as
        words = [
            kind if len(kinds) == 1 else f"{count} x {kind}" for kind, count in kinds.most_common()
        ]
        if kinds and dense:
            words.append(f"{dense} of {len(layers)} linear layers dense")
        if head and list(kinds) != [head]:
            words.append(f"head: {head}")
        elif kinds and not head:
            words.append("head dense")
        return "; ".join(words) or "none"


class Regions(NamedTuple):
    """What of a layer is plain arithmetic, so that it can be compiled: see ``model.regional``."""

    enter: Callable[[Layer, Tensor, Tensor, Tensor], Tensor]
    leave: Callable[[Layer, Tensor, Tensor], Tensor]


class Layer(nn.Module):
    """One decoder layer."""

    def __init__(self, index: int, make: _Maker) -> None:
        super().__init__()
        self.attention_norm = make.norm(make.config.hidden_size)
        self.attention = Attention(index, make)
        self.feed_forward_norm = make.norm(make.config.hidden_size)
        self.feed_forward = FeedForward(make)
        self.regions = Regions(Layer.enter, Layer.leave)

    def forward(self, x: Tensor, angles: Angles, batch: Batch, cache: KVCache) -> Tensor:
        adapters = batch.adapters
        if adapters is None:
            qkv = self.regions.enter(self, x, *angles)
            return self.regions.leave(self, x, self.attention.mix(qkv, batch, cache))
        qkv = self.enter(x, *angles, adapters)
        return self.leave(x, self.attention.mix(qkv, batch, cache), adapters)

    def enter(
        self, x: Tensor, cosines: Tensor, sines: Tensor, adapters: AdapterRows | None = None
    ) -> Tensor:
        """Up to attention: [T, hidden] -> [T, H + 2 K, D]."""
        return self.attention.project(self.attention_norm(x), cosines, sines, adapters)

    def leave(self, x: Tensor, mixed: Tensor, adapters: AdapterRows | None = None) -> Tensor:
        """From what attention gave, [T, H * D], to the next layer: [T, hidden]."""
        h = x + self.attention.output(mixed, adapters)
        out: Tensor = h + self.feed_forward(self.feed_forward_norm(h), adapters)
        return out

    def slots(self) -> dict[str, WeightSlot]:
        return {
            "input_layernorm.weight": self.attention_norm.slot(),
            **self.attention.slots(),
            "post_attention_layernorm.weight": self.feed_forward_norm.slot(),
            **self.feed_forward.slots(),
        }

    def projections(self) -> dict[str, Projection]:
        return self.attention.projections() | self.feed_forward.projections()


class Attention(nn.Module):
    """Rotary grouped-query attention over the cache's pages."""

    def __init__(self, index: int, make: _Maker) -> None:
        super().__init__()
        config, group = make.config, make.group
        self.index, self.config, self.backend = index, config, make.attention
        self.num_heads = group.share(config.num_heads, "heads")
        self.num_kv_heads = group.share(config.num_kv_heads, "key heads")
        self.window, self.scale = config.windows[index], config.head_size**-0.5
        queries, keys = (
            config.num_heads * config.head_size,
            config.num_kv_heads * config.head_size,
        )
        self.qkv = make.linear(config.hidden_size, [queries, keys, keys], bias=config.qkv_bias)
        self.output = make.linear(
            queries, [config.hidden_size], bias=config.output_bias, by_rows=True
        )
        self.q_norm = make.norm(config.head_size) if config.qk_norm else None
        self.k_norm = make.norm(config.head_size) if config.qk_norm else None

    def project(
        self, x: Tensor, cosines: Tensor, sines: Tensor, adapters: AdapterRows | None = None
    ) -> Tensor:
        """Queries, keys and values, the first two turned: [T, H + 2 K, D]."""
        heads, size = self.num_heads, self.config.head_size
        qkv: Tensor = self.qkv(x, adapters).view(x.size(0), -1, size)  # T, H + 2 K, D
        turned = qkv[:, : heads + self.num_kv_heads]
        if self.q_norm is not None and self.k_norm is not None:
            q, k = turned[:, :heads], turned[:, heads:]
            turned = torch.cat((self.q_norm(q), self.k_norm(k)), 1)
        qkv[:, : heads + self.num_kv_heads] = rotate(turned, cosines, sines)
        return qkv

    def mix(self, qkv: Tensor, batch: Batch, cache: KVCache) -> Tensor:
        """What each token takes from its row's keys, these included: [T, H * D]."""
        heads = self.num_heads
        cache.write(self.index, qkv[:, heads:], batch)
        mixed = attention(
            qkv[:, :heads],
            self.index,
            batch,
            cache,
            scale=self.scale,
            window=self.window,
            backend=self.backend,
        )
        return mixed.flatten(1)

    def slots(self) -> dict[str, WeightSlot]:
        found = self.qkv.slots(QKV, self.config.qkv_bias)
        found |= self.output.slots(OUTPUT, self.config.output_bias)
        if self.q_norm is not None and self.k_norm is not None:
            found["self_attn.q_norm.weight"] = self.q_norm.slot()
            found["self_attn.k_norm.weight"] = self.k_norm.slot()
        return found

    def projections(self) -> dict[str, Projection]:
        return projections_of(self.qkv, QKV) | projections_of(self.output, OUTPUT)


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, make: _Maker) -> None:
        super().__init__()
        config = make.config
        self.has_bias = config.mlp_bias
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_up = make.linear(hidden, [inner, inner], bias=config.mlp_bias)
        self.down = make.linear(inner, [hidden], bias=config.mlp_bias, by_rows=True)

    def forward(self, x: Tensor, adapters: AdapterRows | None = None) -> Tensor:
        gate, up = self.gate_up(x, adapters).chunk(2, dim=-1)
        out: Tensor = self.down(F.silu(gate) * up, adapters)
        return out

    def slots(self) -> dict[str, WeightSlot]:
        found = self.gate_up.slots(GATE_UP, self.has_bias)
        return found | self.down.slots(DOWN, self.has_bias)

    def projections(self) -> dict[str, Projection]:
        return projections_of(self.gate_up, GATE_UP) | projections_of(self.down, DOWN)


class _Maker:
    """Makes the leaves of one network: what they all share is said once."""

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device,
        group: ParallelGroup,
        attention: str,
    ) -> None:
        self.config, self.group, self.attention = config, group, attention
        self._dtype, self._device = dtype, device

    def linear(
        self,
        inputs: int,
        parts: list[int],
        *,
        bias: bool = False,
        by_rows: bool = False,
        is_split: bool = True,
    ) -> Linear:
        return Linear(
            inputs,
            parts,
            has_bias=bias,
            dtype=self._dtype,
            device=self._device,
            group=self.group if is_split else ParallelGroup(),
            by_rows=by_rows,
        )

    def norm(self, size: int) -> RMSNorm:
        return RMSNorm(size, self.config.norm_eps, self._dtype, self._device)


def _tapped(taps: Taps | None, layer: int, x: Tensor) -> Tensor:
    if taps is None:
        return x
    replaced = taps(layer, x)
    return x if replaced is None else replaced
