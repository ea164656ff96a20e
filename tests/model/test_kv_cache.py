"""Keys and values lie where their slots say, and pages are copied in the order given."""

from __future__ import annotations

import pytest
import torch

from model.batch import BatchBuilder, BatchRow
from model.config import ModelConfig
from model.kv_cache import KVCache, bytes_per_block
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


def make(dtype: torch.dtype = torch.float32) -> KVCache:
    return KVCache(CONFIG, 6, 4, dtype, "cpu")


def test_pages_are_head_major() -> None:
    cache = make()
    assert len(cache.keys) == len(cache.values) == 3
    assert {each.shape for each in (*cache.keys, *cache.values)} == {(6, 2, 4, 8)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_are_found_at_their_slots(dtype: torch.dtype) -> None:
    cache = make(dtype)
    rows = [BatchRow([1], 5, [3, 5], 1), BatchRow([1] * 6, 1, [4, 1], 1)]
    batch = BatchBuilder(16, 4, 4, 4).build(rows)
    written = torch.randn(7, 4, 8).to(dtype)
    cache.write(1, written, batch)
    for token, (page, place) in enumerate(zip(batch.slot_blocks, batch.slot_offsets, strict=True)):
        assert torch.equal(cache.keys[1][page, :, place], written[token, :2])
        assert torch.equal(cache.values[1][page, :, place], written[token, 2:])
    assert int(cache.keys[1].count_nonzero()) == 7 * 2 * 8
    assert not cache.keys[0].any()
    assert not cache.values[2].any()


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
    for dtype in (torch.float32, torch.bfloat16):
        cache = make(dtype)
        taken = sum(each.numel() * each.element_size() for each in (*cache.keys, *cache.values))
        assert bytes_per_block(CONFIG, 4, dtype) * 6 == taken


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
