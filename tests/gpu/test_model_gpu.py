"""A whole network on the device: the text is that of the CPU, eagerly and by graph."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from model import attention_cuda
from model.batch import BatchBuilder, BatchRow
from model.cuda_graphs import DecodeGraphs
from model.kv_cache import KVCache
from model.llama import Llama
from model.lora import Adapter, LowRank
from tests.model.random_llama import Writer, random_llama

PROMPTS = [[400], [5, 6, 7, 8], [9] * 70, list(range(20, 300)), [3, 1]]
STEPS = 40
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "window": {
        "architectures": ["MistralForCausalLM"],
        "sliding_window": 32,
    },
    "biases and tied": {
        "architectures": ["Qwen2ForCausalLM"],
        "tie_word_embeddings": True,
    },
    "normed heads": {"architectures": ["Qwen3ForCausalLM"], "head_dim": 64},
}


@pytest.fixture(autouse=True)
def _exact_float32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("attention", ["triton", "sdpa"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_text_equals_that_of_the_cpu(attention: str, variant: str) -> None:
    skip_without(attention)
    expected = Writer(random_llama("cpu", "reference", **VARIANTS[variant]), 256).write(
        PROMPTS, STEPS
    )
    model = random_llama("cuda", attention, **VARIANTS[variant])
    assert Writer(model, 256).write(PROMPTS, STEPS) == expected


def test_small_pages_give_the_same_text() -> None:
    skip_without("triton")
    prompts = [prompt[:40] for prompt in PROMPTS]
    expected = Writer(random_llama("cpu", "reference"), 32).write(prompts, STEPS)
    assert Writer(random_llama("cuda", "triton"), 32).write(prompts, STEPS) == expected


@pytest.mark.parametrize("variant", VARIANTS)
def test_graphs_write_the_same_text(variant: str) -> None:
    skip_without("triton")
    model = random_llama("cuda", "triton", **VARIANTS[variant])
    assert DecodeGraphs.can_capture(model)
    expected = Writer(model, 256).write(PROMPTS, STEPS)
    graphed = Writer(model, 256, with_graphs=True)
    assert graphed.write(PROMPTS, STEPS) == expected
    assert graphed.write(PROMPTS[:2], 5) == [text[:5] for text in expected[:2]]
    assert graphed.write(PROMPTS, STEPS) == expected


def test_replayed_rows_go_through_the_adapters_of_their_step() -> None:
    """By graph with the slots filled, changed and emptied after it was captured."""
    skip_without("triton")
    eager, graphed = (random_llama("cuda", "triton") for _ in range(2))
    for model in (eager, graphed):
        model.make_adapter_slots(3, 8)
    plain = Writer(eager, 256)
    captured = Writer(graphed, 256, with_graphs=True)
    graphs = captured.graphs
    assert graphs is not None
    rows = [BatchRow([7 + i], 0, [1 + i], 1, adapter=slot) for i, slot in enumerate([0, 2, None])]
    many = [BatchRow([7 + i], 0, [1 + i], 1, adapter=2) for i in range(13)]
    builders = [BatchBuilder(64, 16, 4, 256, "cuda") for _ in range(2)]
    with torch.inference_mode():
        for seed in range(3):
            for model in (eager, graphed):
                fill_slot(model, 0, seed, ["o_proj", "gate_proj"])
                fill_slot(model, 2, seed + 10, ["v_proj", "down_proj"] if seed < 2 else [])
            for step in (rows, many, rows[:1]):
                batch = builders[0].build(step)
                assert graphs.bucket_of(batch) in graphs._graphs
                found = graphs.forward(batch)
                wanted = eager.forward(builders[1].build(step), plain.cache)
                torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-3)


def fill_slot(model: Llama, slot: int, seed: int, modules: list[str]) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, projection in model.projections().items():
        if name.rpartition(".")[2] in modules:
            down, up = (torch.randn(4, n, generator=generator) for n in projection.shape[::-1])
            weights[name] = LowRank(down * 0.1, up * 0.1)
    model.fill_adapter_slot(slot, Adapter(weights))


@pytest.mark.parametrize("graphed", [False, True])
@pytest.mark.parametrize("variant", ["llama", "window"])
def test_flashinfer_gives_logits_near_those_of_float32(variant: str, graphed: bool) -> None:
    skip_without("flashinfer")
    shape = VARIANTS[variant] | {"head_dim": 64}
    prompts = [BatchRow(prompt, 0, [i + 1, i + 6], 1) for i, prompt in enumerate(PROMPTS[1:4])]
    decodes = [BatchRow([3], len(row.tokens), row.block_table, 1) for row in prompts]
    logits = []
    for device, backend, dtype in (
        ("cpu", "reference", torch.float32),
        ("cuda", "flashinfer", torch.bfloat16),
    ):
        model = random_llama(device, backend, dtype, **shape)
        cache = KVCache(model.config, 20, 256, dtype, device)
        builder = BatchBuilder(512, 4, 4, 256, device)
        with torch.inference_mode():
            model.forward(builder.build(prompts), cache)
            forward = partial(model.forward, cache=cache)
            if graphed and backend == "flashinfer":
                graphs = DecodeGraphs(model, cache, 4, 4)
                graphs.capture()
                forward = graphs.forward
            logits.append(torch.log_softmax(forward(builder.build(decodes)), -1).cpu())
    assert (logits[0] - logits[1]).abs().max() < 0.35
    assert (logits[0] - logits[1]).abs().mean() < 0.05


@pytest.mark.parametrize("attention", ["triton", "varlen", "sdpa"])
def test_bfloat16_logits_are_near_those_of_float32(attention: str) -> None:
    skip_without(attention)
    rows = [BatchRow(prompt, 0, [i + 1, i + 6], 1) for i, prompt in enumerate(PROMPTS[:3])]
    logits = []
    for device, backend, dtype in (
        ("cpu", "reference", torch.float32),
        ("cuda", attention, torch.bfloat16),
    ):
        model = random_llama(device, backend, dtype)
        cache = KVCache(model.config, 20, 256, dtype, device)
        batch = BatchBuilder(512, 4, 4, 256, device).build(rows)
        logits.append(torch.log_softmax(model.forward(batch, cache), -1).cpu())
    assert (logits[0] - logits[1]).abs().max() < 0.35
    assert (logits[0] - logits[1]).abs().mean() < 0.05


def test_a_graphed_step_does_not_wait_for_the_device() -> None:
    skip_without("triton")
    graphed = Writer(random_llama("cuda", "triton"), 256, with_graphs=True)
    graphs = graphed.graphs
    assert graphs is not None
    builder = BatchBuilder(16, 16, 16, 256, "cuda")
    rows = [BatchRow([5], 0, [1], 1), BatchRow([6], 0, [2], 1)]
    graphs.forward(builder.build(rows))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        graphs.forward(builder.build(rows))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def skip_without(attention: str) -> None:
    if attention == "triton" and not attention_cuda.triton_available():
        pytest.skip("Triton attention is not available here")
    if attention == "flashinfer" and (refusal := attention_cuda.flashinfer_refusal()):
        pytest.skip(f"flashinfer: {refusal}")
    if attention == "varlen" and not attention_cuda.varlen_available():
        pytest.skip("paged varlen attention is not available here")
