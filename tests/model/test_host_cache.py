"""Pages come back from host memory as they went, in every number format and on both ways."""

from __future__ import annotations

import random

import pytest
import torch

from model.host_cache import HostCache
from model.kv_cache import KVCache, bytes_per_block
from tests.model.test_kv_cache import CONFIG, FP8, INT8, written

DTYPES = [torch.float32, torch.bfloat16, FP8, INT8]
PLAIN, STAGED = 0, 2  # copied as they lie; through staging buffers of two pages, as on CUDA
PAGE = 4


def contents(cache: KVCache, page: int, tokens: int = PAGE) -> list[torch.Tensor]:
    return [
        each[:, :, :tokens]
        for layer in range(3)
        for each in cache.read(layer, [page], torch.float32)
    ]


def filled(dtype: torch.dtype) -> KVCache:
    return written(KVCache(CONFIG, 6, PAGE, dtype, "cpu"))


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, one, other))


@pytest.mark.parametrize("staged", [PLAIN, STAGED])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_page_comes_back_as_it_went(dtype: torch.dtype, staged: int) -> None:
    cache = filled(dtype)
    host = HostCache(cache, 4, staged)
    before = {page: contents(cache, page) for page in range(6)}
    assert not same(before[1], before[2])
    host.store([(1, 3, PAGE), (2, 0, PAGE), (5, 1, PAGE)])
    for pool in (*cache.layers, *cache.scales):
        pool.view(torch.uint8 if dtype == FP8 else pool.dtype).zero_()
    host.load([(0, 4, PAGE), (3, 2, PAGE), (1, 3, PAGE)])
    assert same(contents(cache, 4), before[2])
    assert same(contents(cache, 2), before[1])
    assert same(contents(cache, 3), before[5])
    for untouched in (0, 1, 5):
        assert not any(bool(each.any()) for each in contents(cache, untouched))


@pytest.mark.parametrize("staged", [PLAIN, STAGED])
def test_a_part_of_a_page_is_loaded_alone(staged: int) -> None:
    cache = filled(INT8)
    host = HostCache(cache, 2, staged)
    before = {page: contents(cache, page) for page in range(6)}
    host.store([(1, 1, 3)])
    host.load([(1, 2, 2)])
    assert same(contents(cache, 2, 2), [each[:, :, :2] for each in before[1]])
    if staged == PLAIN:  # on CUDA whole pages travel: the rest of a fresh page is of no account
        rest = [each[:, :, 2:] for each in contents(cache, 2)]
        assert same(rest, [each[:, :, 2:] for each in before[2]])
    assert same(contents(cache, 3), before[3])


@pytest.mark.parametrize("staged", [PLAIN, 1, STAGED])
@pytest.mark.parametrize("seed", range(5))
def test_any_order_of_stores_and_loads(seed: int, staged: int) -> None:
    dice = random.Random(seed)
    cache = filled(dice.choice(DTYPES))
    host = HostCache(cache, 3, staged)
    pages = {page: contents(cache, page) for page in range(6)}
    slots: dict[int, list[torch.Tensor]] = {}
    for _ in range(30):
        stores = [(dice.randrange(1, 6), dice.randrange(3), PAGE) for _ in range(dice.randrange(5))]
        host.store(stores)
        for page, slot, _ in stores:
            slots[slot] = pages[page]
        targets = dice.sample(range(1, 6), dice.randrange(4) if slots else 0)
        loads = [(dice.choice(list(slots)), page, PAGE) for page in targets]
        host.load(loads)
        for slot, page, _ in loads:
            pages[page] = slots[slot]
        assert all(same(contents(cache, page), pages[page]) for page in range(6))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_slot_takes_what_a_page_takes(dtype: torch.dtype) -> None:
    host = HostCache(filled(dtype), 2)
    assert host.page_bytes == bytes_per_block(CONFIG, PAGE, dtype)
