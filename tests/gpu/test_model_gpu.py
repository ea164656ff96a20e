"""A whole network on the device: the text is that of the CPU, eagerly and by graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from model import attention_cuda
from model.cuda_graphs import DecodeGraphs
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


@pytest.mark.parametrize("attention", ["triton", "varlen", "sdpa"])
def test_bfloat16_logits_are_near_those_of_float32(attention: str) -> None:
    skip_without(attention)
    from model.batch import BatchBuilder, BatchRow
    from model.kv_cache import KVCache

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
    from model.batch import BatchBuilder, BatchRow

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
    if attention == "varlen" and not attention_cuda.varlen_available():
        pytest.skip("paged varlen attention is not available here")
