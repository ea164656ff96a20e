"""Keys and values lie where their slots say, and pages are copied in the order given."""

from __future__ import annotations

import pytest
import torch

from model.batch import BatchBuilder, BatchRow
from model.config import ModelConfig
from model.kv_cache import KVCache, bytes_per_block
from model.kv_format import dequantize, quantize
from model.parallel import ParallelGroup

CONFIG = ModelConfig.from_huggingface(
    {
        "model_type": "llama",
        "vocab_size": 32,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
)


FP8, INT8 = torch.float8_e4m3fn, torch.int8


def make(dtype: torch.dtype = torch.float32) -> KVCache:
    return KVCache(CONFIG, 6, 4, dtype, "cpu")


def written(cache: KVCache, seed: int = 0) -> KVCache:
    """Every place of every page but 0 holds something."""
    generator = torch.Generator().manual_seed(seed)
    rows = [BatchRow([1] * 20, 0, [1, 2, 3, 4, 5], 1)]
    batch = BatchBuilder(32, 1, 5, 4).build(rows)
    for layer in range(3):
        cache.write(layer, torch.randn(20, 4, 8, generator=generator), batch)
    return cache


def test_pages_are_head_major() -> None:
    cache = make()
    assert len(cache.keys) == len(cache.values) == 3
    assert {each.shape for each in (*cache.keys, *cache.values)} == {(6, 2, 4, 8)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, FP8, INT8])
def test_keys_are_found_at_their_slots(dtype: torch.dtype) -> None:
    cache = make(dtype)
    rows = [BatchRow([1], 5, [3, 5], 1), BatchRow([1] * 6, 1, [4, 1], 1)]
    batch = BatchBuilder(16, 4, 4, 4).build(rows)
    keys_values = torch.randn(7, 4, 8)
    cache.write(1, keys_values, batch)
    written = dequantize(*quantize(keys_values, dtype), torch.float32)
    keys, values = cache.read(1, list(range(6)), torch.float32)
    for token, (page, place) in enumerate(zip(batch.slot_blocks, batch.slot_offsets, strict=True)):
        assert torch.equal(keys[page, :, place], written[token, :2])
        assert torch.equal(values[page, :, place], written[token, 2:])
    assert int(keys.abs().sum(-1).count_nonzero()) == 7 * 2
    for layer in (0, 2):
        assert not any(
            bool(each.any()) for each in cache.read(layer, [0, 1, 3, 4, 5], dtype=torch.float32)
        )


def test_copies_are_made_in_order_and_only_so_far() -> None:
    cache = make()
    for layer in range(3):
        cache.keys[layer].copy_(torch.randn(6, 2, 4, 8))
        cache.values[layer].copy_(torch.randn(6, 2, 4, 8))
    before = [each.clone() for each in (*cache.keys, *cache.values)]
    cache.copy([(1, 2, 3), (2, 3, 4)])
    for old, new in zip(before, (*cache.keys, *cache.values), strict=True):
        expected = old.clone()
        expected[2, :, :3] = old[1, :, :3]
        expected[3] = expected[2]
        assert torch.equal(new, expected)


def test_bytes_of_a_page_are_what_a_page_takes() -> None:
    for dtype in (torch.float32, torch.bfloat16, FP8, INT8):
        cache = make(dtype)
        parts = (*cache.keys, *cache.values, *cache.scales)
        taken = sum(each.numel() * each.element_size() for each in parts)
        assert bytes_per_block(CONFIG, 4, dtype) * 6 == taken


@pytest.mark.parametrize("dtype", [FP8, INT8])
def test_copies_of_quantized_pages_take_their_scales_along(dtype: torch.dtype) -> None:
    cache = written(make(dtype))
    before = [cache.read(layer, list(range(6)), torch.float32) for layer in range(3)]
    cache.copy([(1, 2, 3), (2, 3, 4)])
    for layer in range(3):
        for old, new in zip(before[layer], cache.read(layer, [2, 3], torch.float32), strict=True):
            expected = torch.cat((old[1, :, :3], old[2, :, 3:]), 1)
            assert torch.equal(new, torch.stack((expected, expected)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FP8, INT8])
def test_what_is_no_number_is_wiped_from_the_pages_named(dtype: torch.dtype) -> None:
    cache = written(make(dtype))
    for layer in range(3):
        if dtype == FP8:
            cache.layers[layer].view(torch.uint8)[:, 1:4, 0, 2] = torch.tensor([0x7F, 0xFF] * 4)
        elif dtype == INT8:
            cache.scales[layer][:, 1:4, 0, 2] = float("nan")
            cache.scales[layer][:, 1:4, 0, 3] = float("inf")
        else:
            cache.layers[layer][:, 1:4, 0, 2] = float("nan")
    healthy = [cache.read(layer, [4, 5], torch.float32) for layer in range(3)]
    cache.cleanse([1, 3])
    for layer in range(3):
        for pool in cache.read(layer, [1, 3], torch.bfloat16):
            assert pool.isfinite().all()
            assert not pool[:, 0, 2].any()
            assert pool[:, 1].any(-1).all(), "numbers were wiped too"
        if dtype == FP8:  # read bit by bit, which does not know NaN
            codes = cache.layers[layer].view(torch.uint8)
            assert ((codes[:, [1, 3]] & 0x7F) != 0x7F).all()
            assert ((codes[:, 2, 0, 2] & 0x7F) == 0x7F).all(), "a page not named"
        for old, new in zip(healthy[layer], cache.read(layer, [4, 5], torch.float32), strict=True):
            assert torch.equal(old, new)


def test_a_cache_of_fp8_holds_twice_the_tokens_and_of_int8_nearly() -> None:
    wide = ModelConfig.from_huggingface(
        {"model_type": "llama", "vocab_size": 32, "hidden_size": 512, "intermediate_size": 32}
        | {"num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 2}
    )
    page = bytes_per_block(wide, 256, torch.bfloat16)
    assert page == 2 * bytes_per_block(wide, 256, FP8)
    assert page / bytes_per_block(wide, 256, INT8) == pytest.approx(2 * 64 / 68)


def test_ranks_hold_a_share_of_the_heads() -> None:
    group = ParallelGroup(0, 2)
    assert KVCache(CONFIG, 6, 4, torch.float32, "cpu", group).keys[0].shape == (6, 1, 4, 8)
    whole = bytes_per_block(CONFIG, 4, torch.float32)
    assert bytes_per_block(CONFIG, 4, torch.float32, group) * 2 == whole


def test_pages_begin_as_zeros_and_are_given_back() -> None:
    cache = make()
    assert not any(bool(each.any()) for each in (*cache.keys, *cache.values))
    cache.close()
    assert not cache.keys
