"""Quantized pages on the device, and pages that go to host memory and come back."""

from __future__ import annotations

import random

import pytest
import torch

from model import attention_cuda
from model.config import ModelConfig
from model.host_cache import HostCache
from model.kv_cache import KVCache
from model.kv_format import KV_CACHE_DTYPES, dequantize, quantize
from tests.model.paged_reference import random_case, reference
from tests.model.random_llama import SHAPE

ROWS = [(1, 5), (1, 3_000), (1, 256), (3, 3), (256, 768)]
FORMATS = ["bfloat16", "fp8", "int8"]


@pytest.mark.parametrize("name", ["fp8", "int8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 100])
def test_triton_reads_quantized_pages_as_what_they_hold(
    name: str, dtype: torch.dtype, window: int | None
) -> None:
    if not attention_cuda.triton_available(KV_CACHE_DTYPES[name]):
        pytest.skip("Triton attention is not available here")
    case = random_case(ROWS, page=256, unread=0.0).to("cuda", dtype)
    stored, scales = quantize(torch.stack((case.k_pages, case.v_pages)), KV_CACHE_DTYPES[name])
    out = attention_cuda.triton_attention(
        case.q, *stored.unbind(), case.batch, case.scale, window, scales
    )
    case.k_pages, case.v_pages = dequantize(stored, scales, torch.float32)
    torch.testing.assert_close(out.float(), reference(case, window), atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("window", [None, 100])
def test_flashinfer_reads_fp8_pages_as_what_they_hold(window: int | None) -> None:
    pages = KV_CACHE_DTYPES["fp8"]
    if refusal := attention_cuda.flashinfer_refusal(torch.bfloat16, 64, pages):
        pytest.skip(f"flashinfer: {refusal}")
    case = random_case(ROWS, page=256, unread=0.0).to("cuda", torch.bfloat16)
    stored, _ = quantize(torch.stack((case.k_pages, case.v_pages)), pages)
    out = attention_cuda.flashinfer_attention(
        case.q, *stored.unbind(), case.batch, case.scale, window
    )
    case.k_pages, case.v_pages = dequantize(stored, None, torch.float32)
    torch.testing.assert_close(out.float(), reference(case, window), atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("name", FORMATS)
def test_pages_come_back_from_host_memory_while_the_device_goes_on_writing(name: str) -> None:
    """Every page is overwritten right after its store is queued, without waiting."""
    dice = random.Random(0)
    config = ModelConfig.from_huggingface(SHAPE)
    cache = KVCache(config, 24, 256, KV_CACHE_DTYPES[name], "cuda")
    host = HostCache(cache, 16)
    marks = dict.fromkeys(range(24), 0)
    slots: dict[int, int] = {}
    for mark in range(1, 200):
        pages = dice.sample(range(1, 24), 6)
        stores = [(page, dice.randrange(16), 256) for page in pages]
        host.store(stores)
        slots |= {slot: marks[page] for page, slot, _ in stores}
        for page in pages:
            fill(cache, page, mark % 17)
            marks[page] = mark % 17
        targets = dice.sample(range(1, 24), 5)
        loads = [(dice.choice(list(slots)), page, 256) for page in targets]
        host.load(loads)
        marks |= {page: slots[slot] for slot, page, _ in loads}
    for page, mark in marks.items():
        for layer in range(len(cache.keys)):
            stored = cache.layers[layer][:, page].float()
            assert (stored == mark).all(), (page, mark)
    torch.cuda.synchronize()


def fill(cache: KVCache, page: int, number: int) -> None:
    """With a whole number that every format holds exactly."""
    for pool in (*cache.layers, *cache.scales):
        pool[:, page] = torch.tensor(float(number), device=pool.device).to(pool.dtype)
