"""What of the decode graphs needs no GPU: buckets, and batches padded to them."""

from __future__ import annotations

import itertools

import pytest
import torch

from model.batch import BatchBuilder, BatchRow
from model.cuda_graphs import DecodeGraphs, PaddedDecodes, buckets
from model.kv_cache import KVCache
from tests.model.random_llama import random_llama


@pytest.mark.parametrize("max_rows", [1, 2, 3, 5, 8, 9, 31, 32, 64, 100, 256, 1_000])
def test_buckets_rise_to_the_limit_and_waste_at_most_half(max_rows: int) -> None:
    found = buckets(max_rows)
    assert found == sorted(set(found))
    assert found[-1] == max_rows
    assert all(high <= 2 * (low + 1) for low, high in itertools.pairwise(found))
    assert len(found) < 50


def test_a_padded_batch_gives_its_rows_the_logits_of_the_batch_alone() -> None:
    model = random_llama("cpu", "reference")
    cache = KVCache(model.config, 20, 16, torch.float32, "cpu")
    builder = BatchBuilder(64, 8, 4, 16)
    padded = PaddedDecodes(8, 4, 16, torch.device("cpu"))
    tables = [[3, 9], [5, 1], [2, 7]]
    prompts = [BatchRow([7, 8, 9, *[11] * 20], 0, tables[0]), BatchRow([4, 5], 0, tables[1])]
    model.forward(builder.build(prompts), cache)

    for rows in (
        [BatchRow([6], 23, tables[0], 1), BatchRow([3], 2, tables[1], 1)],
        [BatchRow([9], 3, tables[1], 1)],  # fewer than before: old rows must not linger
        [BatchRow([1], 24, tables[0], 1), BatchRow([1], 4, tables[1], 1)],
    ):
        batch = builder.build(rows)
        expected = model.forward(batch, cache)
        padded.fill(batch, 5)
        wide = padded.batch(5)
        wide.contexts[: len(rows)] = batch.contexts  # read by a CPU backend, not by a graph
        wide.tables[: len(rows)] = batch.tables
        logits = model.forward(wide, cache)
        torch.testing.assert_close(logits[: len(rows)], expected)


def test_without_a_capture_every_batch_runs_eagerly() -> None:
    model = random_llama("cpu", "reference")
    cache = KVCache(model.config, 4, 16, torch.float32, "cpu")
    batch = BatchBuilder(8, 2, 2, 16).build([BatchRow([5], 0, [1], 1), BatchRow([6, 7], 0, [2], 1)])
    graphs = DecodeGraphs(model, cache, 4, 2)
    assert not graphs.can_capture(model)
    assert torch.equal(graphs.forward(batch), model.forward(batch, cache))


def test_rows_with_adapters_are_not_replayed_without_them() -> None:
    class Trap:
        def replay(self) -> None:
            raise AssertionError("a graph knows no adapter")

    model = random_llama("cpu", "reference")
    model.make_adapter_slots(1, 4)
    cache = KVCache(model.config, 4, 16, torch.float32, "cpu")
    graphs = DecodeGraphs(model, cache, 4, 2)
    graphs._graphs = dict.fromkeys(graphs.buckets, Trap())  # type: ignore[arg-type]
    builder = BatchBuilder(8, 2, 2, 16)
    graphs.forward(builder.build([BatchRow([5], 0, [1], 1, adapter=0)]))
    with pytest.raises(AssertionError, match="knows no adapter"):
        graphs.forward(builder.build([BatchRow([5], 0, [1], 1)]))
