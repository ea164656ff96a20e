"""CUDA graphs on a processor: the operations of a capture, run again on the same tensors.

What a graph cannot hold fails here too: an operation whose result the host reads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.adapters import AdapterRows, AdapterSlots, Run
from model.llama import Llama
from tests.model.adapter_cases import expected
from tests.model.random_llama import random_llama

HOST_READS = (
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.item.default,
    torch.ops.aten.nonzero.default,
)


class Tape(TorchDispatchMode):
    """In the place of ``torch.cuda.CUDAGraph``, and of the context that captures into it."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, Any, Any]] = []
        self.replays = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in HOST_READS, f"{func}: a graph cannot wait for the host"
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self._calls.append((func, args, kwargs, out))
        return out

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, out in self._calls:
            anew = func(*args, **kwargs)
            for place, result in zip(tree_leaves(out), tree_leaves(anew), strict=True):
                if isinstance(place, Tensor) and place.data_ptr() != result.data_ptr():
                    place.copy_(result)


def graphable_llama(**changes: Any) -> Llama:
    """Every launch depends on shapes alone, with the fixture ``flashinfer``.

    That backend is given behind the door's back, which asks for a CUDA device.
    """
    shape = {"head_dim": 64} | changes
    model = random_llama("cpu", "reference", torch.bfloat16, pack=False, **shape)
    model.attention = "flashinfer"
    for layer in model.layers:
        layer.attention.backend = "flashinfer"  # type: ignore[union-attr]
    return model


def by_token(x: Tensor, out: Tensor, rows: AdapterRows, held: AdapterSlots) -> None:
    """In the place of ``adapters_triton.add_by_token``: one operation, which reads the slots."""
    assert rows.slots is not None
    _HELD[id(held)] = held
    _add_by_token(x, out, rows.slots, id(held))


_HELD: dict[int, AdapterSlots] = {}


@torch.library.custom_op("pronk_tests::add_by_token", mutates_args=("out",))
def _add_by_token(x: Tensor, out: Tensor, slots: Tensor, held: int) -> None:
    runs = [Run(slot, i, i + 1) for i, slot in enumerate(slots.tolist()) if slot >= 0]
    out.copy_(expected(x, out, _HELD[held], runs))
