"""Every backend on a processor gives what the plain one gives, whatever the pages look like."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from model import attention_cpu, attention_decode
from model.attention import BACKENDS, UnknownBackend, choose_backend, gathered, reference
from model.attention_cpu import cpu_attention
from model.attention_decode import make_decode_plan
from model.batch import Batch, BatchBuilder, BatchRow
from model.kv_format import KV_CACHE_DTYPES, Pages, dequantize, quantize

FAST = {"cpu": cpu_attention, "sdpa": gathered}
WINDOWS = (None, 1, 5, 70)
CPU = torch.device("cpu")


@dataclass
class Case:
    q: Tensor
    keys: Tensor
    values: Tensor
    batch: Batch
    scales: Tensor | None = None

    def check(self, window: int | None = None, tolerance: float = 2e-5) -> None:
        wanted = self.attend(reference, window)
        for name, backend in FAST.items():
            mine = self.attend(backend, window)
            assert mine.dtype == self.q.dtype
            torch.testing.assert_close(mine, wanted, atol=tolerance, rtol=tolerance, msg=name)

    def attend(self, backend: Callable[..., Tensor], window: int | None = None) -> Tensor:
        pools = (self.keys, self.values)
        return backend(self.q, *pools, self.batch, 0.3, window, self.scales)

    def stored_as(self, name: str) -> Case:
        """The same in another number format; pages nobody holds are no numbers in it either."""
        pages = torch.stack((self.keys, self.values))
        stored, scales = quantize(pages, KV_CACHE_DTYPES[name])
        if scales is not None:
            scales[pages.isnan().any(-1)] = float("nan")
        elif stored.dtype == torch.float8_e4m3fn:
            stored.view(torch.uint8)[pages.isnan()] = 0x7F
        return Case(self.q, *stored.unbind(), self.batch, scales)

    def as_read(self) -> Case:
        """With the numbers the stored ones stand for, as float32."""
        stored = torch.stack((self.keys, self.values))
        return Case(self.q, *dequantize(stored, self.scales, torch.float32), self.batch)


def case(
    rows: list[BatchRow],
    size: int,
    *,
    num_pages: int,
    kv_heads: int = 2,
    group: int = 2,
    width: int = 16,
    dtype: torch.dtype = torch.float32,
) -> Case:
    """Random queries (a slice of a fused projection) and pages; pages nobody holds are NaN."""
    generator = torch.Generator().manual_seed(0)
    num_tokens = sum(len(row.tokens) for row in rows)
    widest = max(len(row.block_table) for row in rows)
    batch = BatchBuilder(num_tokens, len(rows), widest, size).build(rows)
    fused = torch.randn(num_tokens, kv_heads * (group + 2), width, generator=generator)
    pages = torch.randn(2, num_pages, kv_heads, size, width, generator=generator)
    held = {page for table in batch.tables for page in table}
    pages[:, [page for page in range(num_pages) if page not in held]] = float("nan")
    return Case(fused.to(dtype)[:, : kv_heads * group], *pages.to(dtype), batch)


def random_case(seed: int) -> Case:
    """Decodes and chunks of all lengths, some with shared prefix pages, in order or shuffled."""
    pick = random.Random(seed)
    size = pick.choice([4, 16, 64, 256])
    free = list(range(1, 300))
    if seed % 2:
        pick.shuffle(free)
    shared = [free.pop(0) for _ in range(3)]
    histories = [pick.randint(0, 5 * size) for _ in range(pick.randint(0, 6))]
    rows = [_row(pick, 1, history, size, free, shared) for history in histories]
    for _ in range(pick.randint(0 if rows else 1, 3)):
        length = pick.randint(2, 300 if size >= 64 else 30)
        history = pick.choice([0, pick.randint(0, 3 * size)])
        rows.append(_row(pick, length, history, size, free, shared))
    return case(
        rows, size, num_pages=300, kv_heads=pick.choice([1, 2, 3]), group=pick.choice([1, 2, 3])
    )


def _row(
    pick: random.Random, length: int, history: int, size: int, free: list[int], shared: list[int]
) -> BatchRow:
    table = [free.pop(0) for _ in range(-(-(history + length) // size))]
    if pick.random() < 0.5:
        count = min(len(shared), history // size)
        table[:count] = shared[:count]
    return BatchRow([1] * length, history, table, 1)


@pytest.mark.parametrize("seed", range(40))
def test_backends_equal_the_reference_on_any_batch(seed: int) -> None:
    for window in WINDOWS:
        random_case(seed).check(window)


@pytest.mark.parametrize("context", [1, 15, 16, 17, 63, 64, 200])
@pytest.mark.parametrize("kv_heads", [1, 3, 8])
def test_one_row_alone(context: int, kv_heads: int) -> None:
    table = list(range(1, 14))
    rows = [BatchRow([1], context - 1, table, 1)]
    case(rows, 16, num_pages=14, kv_heads=kv_heads, group=3).check()


def test_pages_scattered_over_a_large_pool() -> None:
    pages = random.Random(0).sample(range(1, 2000), 24)
    rows = [BatchRow([1], 16 * 3 - 1 - i, pages[3 * i : 3 * i + 3], 1) for i in range(8)]
    case(rows, 16, num_pages=2000, kv_heads=3).check()


def test_pages_in_descending_order() -> None:
    rows = [BatchRow([1], 60, [9, 8, 7, 6], 1), BatchRow([1] * 40, 20, [5, 4, 3, 2], 1)]
    for window in WINDOWS:
        case(rows, 16, num_pages=10).check(window)


@pytest.mark.parametrize("holders", [2, 8, 31])
def test_a_page_with_many_holders(holders: int) -> None:
    rows = [BatchRow([1], 33 + i % 15, [1, 2, 3 + i], 1) for i in range(holders)]
    for window in WINDOWS:
        case(rows, 16, num_pages=40, kv_heads=3, group=3).check(window)


def test_holders_that_see_different_parts_of_a_page() -> None:
    rows = [BatchRow([1], 17 + 4 * i, [1, 2], 1) for i in range(3)]
    for window in WINDOWS:
        case(rows, 16, num_pages=4).check(window)


def test_chunks_longer_than_a_tile() -> None:
    rows = [BatchRow([1], 3, [9], 1), BatchRow([1] * 300, 77, [1, 2, 3, 4, 5, 6], 1)]
    for window in (None, 3, 64, 130, 400):
        case(rows, 64, num_pages=10).check(window)


@pytest.mark.parametrize("scores", [1, 30_000])
def test_tiles_of_fewer_heads_change_nothing(scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_cpu, "_SCORES", scores)
    rows = [BatchRow([1] * 150, 30, [1, 2, 3], 1), BatchRow([1] * 20, 0, [4], 1)]
    for window in WINDOWS:
        case(rows, 64, num_pages=6, kv_heads=5).check(window)


@pytest.mark.parametrize("seed", range(6))
def test_bfloat16_stays_near_float32(seed: int) -> None:
    exact = random_case(seed)
    half = Case(*(x.bfloat16() for x in (exact.q, exact.keys, exact.values)), exact.batch)
    half.check(tolerance=0.05)


def test_large_scores_do_not_overflow() -> None:
    rows = [BatchRow([1], 40, [1, 2, 3], 1), BatchRow([1] * 20, 20, [4, 5, 6], 1)]
    loud = case(rows, 16, num_pages=8)
    loud.q *= 300
    loud.check(tolerance=1e-3)


# --------------------------------------------------------------------------- other formats


@pytest.mark.parametrize("name", ["fp8", "int8", "bfloat16", "float16"])
@pytest.mark.parametrize("seed", range(12))
def test_pages_in_other_formats_give_what_their_numbers_give(name: str, seed: int) -> None:
    stored = random_case(seed).stored_as(name)
    for window in WINDOWS:
        stored.check(window)
        wanted, found = (each.attend(reference, window) for each in (stored.as_read(), stored))
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("name", ["fp8", "int8"])
def test_quantized_pages_are_widened_in_blocks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages side by side too: never more of the pool at once than stays in the cache."""
    monkeypatch.setattr(attention_decode, "_BLOCK_BYTES", 20_000)  # three pages
    rows = [BatchRow([1], 16 * 20 - 3, list(range(1, 21)), 1), BatchRow([1], 9, [21], 1)]
    stored = case(rows, 16, num_pages=30, kv_heads=3).stored_as(name)
    largest: list[int] = []
    unscaled = Pages.unscaled

    def watched(self: Pages, which: slice | Tensor) -> tuple[Tensor, Tensor | None]:
        numbers, scales = unscaled(self, which)
        largest.append(len(numbers))
        return numbers, scales

    monkeypatch.setattr(Pages, "unscaled", watched)
    for window in WINDOWS:
        stored.check(window)
    assert max(largest) == 3


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("name", ["fp8", "int8"])
def test_answers_move_no_further_than_quantized_keys_and_values_allow(name: str, seed: int) -> None:
    """Scores off by at most e change shares by a factor within exp(+-2e), so an answer moves by at
    most (exp(2e) - 1) times the largest value, and by the values' own error."""
    exact = random_case(seed)
    stored = exact.stored_as(name)
    before, after = exact.attend(reference), stored.attend(reference)
    key_error, value_error = (_allowed_error(pages, name) for pages in (exact.keys, exact.values))
    largest_query = exact.q.abs().sum(-1).max()
    off = 0.3 * largest_query * key_error
    bound = torch.expm1(2 * off) * exact.values.nan_to_num().abs().max() + value_error
    moved = (after - before).abs()
    assert 0 < moved.max() < bound
    # On average far less: rounding goes both ways.
    assert moved.mean() < {"fp8": 0.03, "int8": 0.006}[name]


def _allowed_error(pages: Tensor, name: str) -> Tensor:
    largest = pages.nan_to_num().abs().max()
    return largest / 16 if name == "fp8" else largest / 254


def test_quantized_pages_in_bfloat16_stay_near_float32() -> None:
    for seed in range(4):
        for name in ("fp8", "int8"):
            stored = random_case(seed).stored_as(name)
            half = Case(
                stored.q.bfloat16(), stored.keys, stored.values, stored.batch, stored.scales
            )
            half.check(tolerance=0.05)


# --------------------------------------------------------------------------- plans


def plan_of(tables: list[list[int]], size: int = 256, num_pages: int = 400):
    rows = [BatchRow([1], len(table) * size - 1, table, 1) for table in tables]
    made = BatchBuilder(64, 64, 16, size).build(rows)
    pool = torch.empty(num_pages, 3, size, 64, dtype=torch.bfloat16)
    return make_decode_plan(made, Pages(pool, None, pool.dtype), None)


def test_pages_side_by_side_are_read_in_place() -> None:
    plan = plan_of([[page] for page in range(9, 29)])
    assert [group.pages for group in plan.groups] == [slice(9, 29)]


def test_stretches_of_pages_are_read_in_place_where_that_pays() -> None:
    plan = plan_of([[page] for page in (*range(9, 39), 50, 55, *range(60, 90))])
    in_place, again, gathered_pages = (group.pages for group in plan.groups)
    assert (in_place, again) == (slice(9, 39), slice(60, 90))
    assert gathered_pages.tolist() == [50, 55]


def test_scattered_pages_are_gathered_in_blocks() -> None:
    groups = plan_of([[page, page + 2] for page in range(5, 245, 4)]).groups
    assert [len(group.pages) for group in groups] == [42, 42, 36]  # of 8 MB at most


def test_a_shared_page_is_read_once() -> None:
    plan = plan_of([[1, 2, 3 + row] for row in range(8)])
    assert sorted(group.num_holders for group in plan.groups) == [1, 8]
    assert sum(len(group.holders) // group.num_holders for group in plan.groups) == 10


# --------------------------------------------------------------------------- choosing


def test_auto_is_the_fast_one_of_the_device() -> None:
    assert choose_backend("auto", CPU) == "cpu"


@pytest.mark.parametrize("name", ["reference", "cpu", "sdpa"])
def test_a_backend_may_be_named(name: str) -> None:
    assert choose_backend(name, CPU) == name


def test_unknown_backends_are_refused_with_the_known_ones() -> None:
    with pytest.raises(UnknownBackend) as caught:
        choose_backend("flash", CPU)
    assert all(name in str(caught.value) for name in BACKENDS)


@pytest.mark.parametrize("name", ["triton", "varlen"])
def test_backends_of_gpus_are_refused_without_one(name: str) -> None:
    with pytest.raises(UnknownBackend, match="CUDA"):
        choose_backend(name, CPU)
