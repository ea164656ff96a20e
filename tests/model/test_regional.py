"""Compiled regions of a layer: whole graphs, compiled before they serve and never again."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from model import regional
from model.batch import BatchBuilder, BatchRow
from model.kv_cache import KVCache
from model.llama import Layer, Llama, Regions
from model.regional import CannotCompile, compile_regions, settle_regions, use_regions
from tests.model.random_llama import Writer, random_llama

VARIANTS = {
    "llama": {},
    "biases": {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
    "norms": {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 32},
}
PROMPTS = [[7 * i % 500 for i in range(length)] for length in (1, 90, 13)]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def num_graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_compiled_layers_write_the_same_and_nothing_is_compiled_while_they_do(
    variant: str,
) -> None:
    model = random_llama("cpu", **VARIANTS[variant])
    expected = Writer(model, 256).write(PROMPTS, 12)
    compile_regions(model, "aot_eager")
    assert num_graphs() == 4, "two regions, each for one token and for many; all layers share them"
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert Writer(model, 256).write(PROMPTS, 12) == expected
        for length in (2, 3, 31, 512, 1000):  # a decode of so many rows, a chunk of so many tokens
            assert step(model, length).isfinite().all()
    assert num_graphs() == 4


@torch.inference_mode()
def step(model: Llama, length: int) -> Tensor:
    cache = KVCache(model.config, 8, 256, model.dtype, model.device)
    builder = BatchBuilder(1_024, 2, 4, 256)
    rows = [
        BatchRow([5], 0, [5], 1),
        BatchRow([i % 500 for i in range(length)], 0, [1, 2, 3, 4], 1),
    ]
    return model.forward(builder.build(rows), cache)


def test_a_processor_compiles_only_when_told_to() -> None:
    model = random_llama("cpu")
    assert settle_regions(model, "auto", "aot_eager") == ""
    assert settle_regions(model, "off", "aot_eager") == ""
    assert num_graphs() == 0
    assert settle_regions(model, "on", "aot_eager").startswith("layers compiled in")
    assert num_graphs() == 4


def broken(*_: object) -> None:
    raise RuntimeError("no compiler found\nand a stack")


def test_a_compiler_that_does_not_work_is_an_error_or_a_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = random_llama("cpu")
    expected = Writer(model, 256).write(PROMPTS, 3)
    monkeypatch.setattr(regional, "compile_regions", broken)
    with pytest.raises(CannotCompile, match=r"--compile on: no compiler found$"):
        settle_regions(model, "on")
    monkeypatch.setattr(model, "device", torch.device("cuda"))
    monkeypatch.setattr(regional, "_seconds", lambda model: 1.0)
    assert "does not work" in settle_regions(model, "auto")
    monkeypatch.setattr(model, "device", torch.device("cpu"))
    assert Writer(model, 256).write(PROMPTS, 3) == expected


@pytest.mark.parametrize(("compiled_takes", "is_kept"), [(0.5, True), (1.5, False)])
def test_what_is_compiled_is_kept_if_it_is_faster(
    compiled_takes: float, is_kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_llama("cpu")
    seconds = iter([1.0, compiled_takes])
    marked = Regions(lambda *_: torch.ones(1), lambda *_: torch.ones(1))
    monkeypatch.setattr(model, "device", torch.device("cuda"))
    monkeypatch.setattr(regional, "_seconds", lambda model: next(seconds))
    monkeypatch.setattr(regional, "compile_regions", lambda model, _: use_regions(model, marked))
    words = settle_regions(model, "auto")
    layer = model.layers[0]
    assert isinstance(layer, Layer)
    assert (layer.regions is marked) is is_kept
    assert words.startswith("layers compiled" if is_kept else "not compiled (no faster")
