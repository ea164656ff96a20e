"""The network of Llama and of the families that share its shape (Touvron et al. 2023)."""

# T tokens, R wanted logits, H query heads, KV kv heads, D head size

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import kernels
from model.attention import choose_backend
from model.batch import Batch
from model.config import ModelConfig
from model.kernels import Kernels, PagedRows
from model.kv_cache import KVCache
from model.layers import Linear, RMSNorm
from model.layers import WeightSlot as WeightSlot
from model.parallel import ParallelGroup
from model.rope import rotary_table, rotate

Taps = Callable[[int, Tensor], "Tensor | None"]


@dataclass(slots=True)
class Angles:
    """Cosines and sines of one batch's positions, [T, D / 2] float32."""

    cosines: Tensor
    sines: Tensor


class Attention:
    """Self-attention with grouped queries over the paged cache."""

    def __init__(self, model: Llama, layer: int) -> None:
        config, group = model.config, model.group
        self.layer, self.model = layer, model
        self.head_size = config.head_size
        self.num_heads = group.share(config.num_heads)
        self.num_kv_heads = group.share(config.num_kv_heads)
        self.window = config.windows[layer]
        self.scale = config.head_size**-0.5
        queries, keys = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
        place = {"dtype": model.dtype, "device": model.device, "group": group}
        self.qkv = Linear(
            config.hidden_size,
            {"q_proj": queries, "k_proj": keys, "v_proj": keys},
            bias=config.qkv_bias,
            split="column",
            **place,  # type: ignore[arg-type]
        )
        self.output = Linear(
            queries,
            {"o_proj": config.hidden_size},
            bias=config.output_bias,
            split="row",
            **place,  # type: ignore[arg-type]
        )
        self.q_norm, self.k_norm = None, None
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_size, config.norm_eps, model.dtype, model.device)
            self.k_norm = RMSNorm(config.head_size, config.norm_eps, model.dtype, model.device)

    def slots(self) -> dict[str, WeightSlot]:
        found = self.qkv.slots() | self.output.slots()
        if self.q_norm is not None and self.k_norm is not None:
            found |= {"q_norm.weight": self.q_norm.slot(), "k_norm.weight": self.k_norm.slot()}
        return found

    def attend(self, qkv: Tensor, batch: Batch, cache: KVCache, shared: Shared) -> Tensor:
        """[T, (H + 2 KV) D] -> [T, H D], before the output projection."""
        first = 0
        outputs = []
        if shared.rows is not None:
            first = batch.num_decodes
            outputs.append(self._attend_compiled(qkv[:first], cache, shared.rows))
        if first < qkv.shape[0]:
            rest = batch if first == 0 else batch.without_decodes()
            outputs.append(self._attend_torch(qkv[first:], rest, cache, shared.angles, first))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _attend_compiled(self, qkv: Tensor, cache: KVCache, rows: PagedRows) -> Tensor:
        assert self.model.kernels is not None
        return self.model.kernels.paged_attention(
            qkv,
            cache.keys[self.layer],
            cache.values[self.layer],
            rows,
            scale=self.scale,
            window=self.window,
            q_norm=None if self.q_norm is None else self.q_norm.weight,
            k_norm=None if self.k_norm is None else self.k_norm.weight,
            eps=self.model.config.norm_eps,
        )

    def _attend_torch(
        self, qkv: Tensor, batch: Batch, cache: KVCache, angles: Angles, first: int
    ) -> Tensor:
        q, k, v = torch.split(
            qkv.view(qkv.shape[0], -1, self.head_size),
            [self.num_heads, self.num_kv_heads, self.num_kv_heads],
            dim=1,
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        cosines, sines = angles.cosines[first:].unsqueeze(1), angles.sines[first:].unsqueeze(1)
        cache.write(self.layer, rotate(k, cosines, sines), v, batch)
        out = self.model.backend(
            rotate(q, cosines, sines),
            cache.keys[self.layer],
            cache.values[self.layer],
            batch,
            self.scale,
            self.window,
        )
        return out.flatten(1)


class FeedForward:
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, model: Llama) -> None:
        config = model.config
        place = {"dtype": model.dtype, "device": model.device, "group": model.group}
        self.gate_up = Linear(
            config.hidden_size,
            {"gate_proj": config.intermediate_size, "up_proj": config.intermediate_size},
            bias=config.mlp_bias,
            split="column",
            **place,  # type: ignore[arg-type]
        )
        self.down = Linear(
            config.intermediate_size,
            {"down_proj": config.hidden_size},
            bias=config.mlp_bias,
            split="row",
            **place,  # type: ignore[arg-type]
        )

    def slots(self) -> dict[str, WeightSlot]:
        return self.gate_up.slots() | self.down.slots()

    def __call__(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


@dataclass(slots=True)
class Shared:
    """What all layers of one forward share."""

    angles: Angles
    rows: PagedRows | None  # the decoding rows, where compiled kernels serve them


class Layer:
    """Attention and feed-forward, each on a normed copy of the residual stream."""

    def __init__(self, model: Llama, layer: int) -> None:
        config = model.config
        self.model = model
        self.attention_norm = RMSNorm(
            config.hidden_size, config.norm_eps, model.dtype, model.device
        )
        self.attention = Attention(model, layer)
        self.feed_forward_norm = RMSNorm(
            config.hidden_size, config.norm_eps, model.dtype, model.device
        )
        self.feed_forward = FeedForward(model)

    def slots(self) -> dict[str, WeightSlot]:
        return {
            "input_layernorm.weight": self.attention_norm.slot(),
            "post_attention_layernorm.weight": self.feed_forward_norm.slot(),
            **_under("self_attn", self.attention.slots()),
            **_under("mlp", self.feed_forward.slots()),
        }

    def __call__(self, x: Tensor, batch: Batch, cache: KVCache, shared: Shared) -> Tensor:
        qkv = self.attention.qkv(self.attention_norm(x))
        h = x + self.attention.output(self.attention.attend(qkv, batch, cache, shared))
        return h + self.feed_forward(self.feed_forward_norm(h))

    def compiled(
        self, x: Tensor, batch: Batch, cache: KVCache, shared: Shared, kernels: Kernels
    ) -> Tensor:
        """The same for at most ``MAX_ROWS`` tokens, in four compiled passes; changes ``x``."""
        attention, mlp, eps = self.attention, self.feed_forward, self.model.config.norm_eps
        qkv, output = attention.qkv, attention.output
        rows = kernels.rms_linear(x, self.attention_norm.weight, qkv.weight, qkv.bias, eps)
        attended = attention.attend(rows, batch, cache, shared)
        kernels.linear_add(attended, output.weight, output.bias, x)
        norm = self.feed_forward_norm.weight
        inner = kernels.rms_gate_up(x, norm, mlp.gate_up.weight, mlp.gate_up.bias, eps)
        kernels.linear_add(inner, mlp.down.weight, mlp.down.bias, x)
        return x


class Llama(nn.Module):
    """The whole network: token ids in a ``Batch`` to logits of the wanted rows."""

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device | str,
        attention: str = "auto",
        group: ParallelGroup | None = None,
    ) -> None:
        super().__init__()
        self.config, self.dtype, self.device = config, dtype, torch.device(device)
        self.group = group or ParallelGroup()
        self.attention_backend, self.backend = choose_backend(attention, self.device)
        self.kernels = self._load_kernels()
        self.embedding = torch.empty(
            config.vocab_size, config.hidden_size, dtype=dtype, device=device
        )
        self.layers = [Layer(self, layer) for layer in range(config.num_layers)]
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, dtype, self.device)
        self.head: Linear | None = None
        if not config.tie_embeddings:
            self.head = Linear(
                config.hidden_size,
                {"lm_head": config.vocab_size},
                bias=False,
                dtype=dtype,
                device=self.device,
                group=self.group,
            )
        self._angles = Angles(*self._rotary_table(config.max_positions))

    def _load_kernels(self) -> Kernels | None:
        """Compiled kernels want a CPU, bf16, one device, and a head size they can take."""
        fits = self.config.head_size % 16 == 0 and self.config.head_size <= kernels.MAX_HEAD_SIZE
        plain = self.device.type == "cpu" and self.dtype == torch.bfloat16 and self.group.size == 1
        if not fits or not plain or self.attention_backend != "cpu":
            return None
        return kernels.load_kernels()

    def _rotary_table(self, positions: int) -> tuple[Tensor, Tensor]:
        config = self.config
        table = rotary_table(config.rope, config.head_size, positions, config.max_positions)
        return table[0].to(self.device), table[1].to(self.device)

    # ---- loading

    def slots(self) -> dict[str, WeightSlot]:
        """Where each tensor of a checkpoint goes, by its Hugging Face name."""
        shape = tuple(self.embedding.shape)
        found = {
            "model.embed_tokens.weight": WeightSlot(shape, self._fill_embedding),
            "model.norm.weight": self.norm.slot(),
        }
        for number, layer in enumerate(self.layers):
            found |= _under(f"model.layers.{number}", layer.slots())
        return found | (self.head.slots() if self.head is not None else {})

    def _fill_embedding(self, tensor: Tensor) -> None:
        self.embedding.copy_(tensor)

    def pack(self) -> None:
        """After loading: reorder weights for the matrix library, unless the kernels read them."""
        if self.kernels is None:
            for linear in self.linears():
                linear.pack()

    def linears(self) -> list[Linear]:
        found = [] if self.head is None else [self.head]
        for layer in self.layers:
            attention, mlp = layer.attention, layer.feed_forward
            found += [attention.qkv, attention.output, mlp.gate_up, mlp.down]
        return found

    @property
    def attention(self) -> str:
        """The path taken, for people: the backend, and whether compiled kernels serve it."""
        if self.device.type != "cpu" or self.attention_backend != "cpu":
            return self.attention_backend
        usable, why = kernels.kernel_status()
        if self.kernels is not None:
            return f"cpu with {why}"
        return f"cpu in PyTorch ({why if not usable else 'kernels need bf16 weights'})"

    @property
    def num_parameters(self) -> int:
        return sum(_product(slot.shape) for slot in self.slots().values())

    @property
    def weight_bytes(self) -> int:
        return self.num_parameters * self.dtype.itemsize // self.group.size

    # ---- running

    @torch.inference_mode()
    def forward(self, batch: Batch, cache: KVCache, taps: Taps | None = None) -> Tensor:
        """Logits [R, vocab] float32 of ``batch.logit_rows``, in their order.

        ``taps(layer, hidden)`` sees the residual stream [T, hidden] before each layer and after the
        last (layer = num_layers); what it returns, if anything, takes its place.
        """
        x = F.embedding(batch.token_ids, self.embedding)
        shared = self._shared(batch)
        small = self.kernels is not None and batch.num_tokens <= kernels.MAX_ROWS
        for number, layer in enumerate(self.layers):
            x = _tap(taps, number, x)
            if small:
                assert self.kernels is not None
                x = layer.compiled(x, batch, cache, shared, self.kernels)
            else:
                x = layer(x, batch, cache, shared)
        return self._logits(_tap(taps, len(self.layers), x), batch)

    def _shared(self, batch: Batch) -> Shared:
        angles = Angles(self._angles.cosines[batch.positions], self._angles.sines[batch.positions])
        count = batch.num_decodes
        if self.kernels is None or count == 0:
            return Shared(angles, None)
        rows = PagedRows(
            angles.cosines[:count],
            angles.sines[:count],
            batch.block_tables[:count],
            batch.context_lengths[:count],
            max(batch.contexts[:count]),
        )
        return Shared(angles, rows)

    def _logits(self, x: Tensor, batch: Batch) -> Tensor:
        wanted = x if _is_everything(batch) else x[batch.logit_rows]
        weight = self.embedding if self.head is None else self.head.weight
        if self.kernels is not None and 0 < wanted.shape[0] <= kernels.MAX_ROWS:
            return self.kernels.rms_linear(
                wanted.contiguous(),
                self.norm.weight,
                weight,
                None,
                self.config.norm_eps,
                torch.float32,
            )
        hidden = self.norm(wanted)
        out = F.linear(hidden, self.embedding) if self.head is None else self.head(hidden)
        return out.float()


def _is_everything(batch: Batch) -> bool:
    return batch.logit_rows.shape[0] == batch.num_tokens


def _tap(taps: Taps | None, layer: int, x: Tensor) -> Tensor:
    if taps is None:
        return x
    replaced = taps(layer, x)
    return x if replaced is None else replaced


def _under(prefix: str, slots: dict[str, WeightSlot]) -> dict[str, WeightSlot]:
    return {f"{prefix}.{name}": slot for name, slot in slots.items()}


def _product(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product
