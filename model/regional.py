"""torch.compile for what lies around attention: two regions of one layer, shared by all layers.

A region is whole (no graph breaks) and compiled twice, for one token and for any other number, so
that nothing is compiled while a request waits. Attention and the cache stay outside: their kernels
are compiled already. CUDA graphs capture the compiled kernels like any others.
"""

# T tokens

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import torch

from model.llama import Layer, Llama, Regions
from model.stopwatch import Stopwatch

log = logging.getLogger(__name__)

SOME = 16  # tokens: the graph made with them serves every number above one
CHUNK = 512  # tokens, where eager and compiled are compared
REPEATS = 10


class CannotCompile(ValueError):
    """The compiler was asked for and does not work here."""


def settle_regions(model: Llama, wanted: str, backend: str = "inductor") -> str:
    """Compile or not; says in words what was done, nothing where it is a matter of course.

    ``wanted`` is auto, on or off. ``auto`` compiles on CUDA and keeps what was compiled if it is
    faster; on processors it never paid (model/README.md). ``on`` raises CannotCompile where auto
    would go on without. A network in compiled kernels has no use for it.
    """
    is_cuda = model.device.type == "cuda"
    if wanted == "off" or model.compiled is not None or (wanted == "auto" and not is_cuda):
        return ""
    began = time.monotonic()
    eager = _seconds(model) if wanted == "auto" else 0.0
    try:
        compile_regions(model, backend)
        seconds = _seconds(model)
    except Exception as error:  # what compilers raise is not ours to list
        use_regions(model, Regions(Layer.enter, Layer.leave))
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        if wanted == "on":
            raise CannotCompile(f"--compile on: {line}") from error
        log.warning("layers are not compiled: %s", line)
        return "not compiled (the compiler does not work here)"
    took = time.monotonic() - began
    if wanted == "auto" and seconds >= eager:
        use_regions(model, Regions(Layer.enter, Layer.leave))
        return f"not compiled (no faster; found out in {took:.0f} s)"
    return f"layers compiled in {took:.0f} s"


def compile_regions(model: Llama, backend: str = "inductor") -> None:
    """Raises whatever the compiler does."""
    use_regions(
        model,
        Regions(
            torch.compile(Layer.enter, fullgraph=True, backend=backend),
            torch.compile(Layer.leave, fullgraph=True, backend=backend),
        ),
    )
    for num_tokens in (SOME, 1):
        _run(model, num_tokens, mark=True)


def use_regions(model: Llama, regions: Regions) -> None:
    for layer in model.layers:
        assert isinstance(layer, Layer)
        layer.regions = regions


@torch.inference_mode()
def _run(model: Llama, num_tokens: int, *, mark: bool = False) -> None:
    """Every layer once, on noise; a layer that is not like the first is compiled here too."""
    config = model.config
    x = torch.randn(num_tokens, config.hidden_size, device=model.device).to(model.dtype)
    angles = model.angles(torch.arange(num_tokens, device=model.device))
    for layer in model.layers:
        assert isinstance(layer, Layer)
        own = layer.attention
        width = own.num_heads * config.head_size
        mixed = torch.zeros(num_tokens, width, dtype=model.dtype, device=model.device)
        if mark and num_tokens > 1:
            for tensor in (x, mixed, *angles):
                torch._dynamo.mark_dynamic(tensor, 0)
        layer.regions.enter(layer, x, *angles)
        layer.regions.leave(layer, x, mixed)


def _seconds(model: Llama) -> float:
    """Of the regions of all layers on a chunk: the best of several."""
    return min(_timed(lambda: _run(model, CHUNK), model.device) for _ in range(REPEATS))


def _timed(work: Callable[[], None], device: torch.device) -> float:
    watch = Stopwatch(device)
    work()
    watch.stop()
    return watch.seconds
