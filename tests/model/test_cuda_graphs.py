"""What of the decode graphs needs no GPU: buckets, and batches padded to them."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from model import adapters
from model.batch import BatchBuilder, BatchRow
from model.cuda_graphs import DecodeGraphs, PaddedDecodes, buckets
from model.kv_cache import KVCache
from model.llama import Llama
from model.lora import Adapter, LowRank
from tests.model.graph_tape import Tape, by_token, graphable_llama
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


def test_padding_goes_through_no_adapter() -> None:
    builder = BatchBuilder(8, 4, 1, 16)
    padded = PaddedDecodes(4, 1, 16, torch.device("cpu"))
    for slots in ([0, 2, None, 1], [None, 1]):
        rows = [BatchRow([5], 0, [1], 1, adapter=slot) for slot in slots]
        padded.fill(builder.build(rows), 4)
        rows_of_adapters = padded.batch(4, has_adapters=True).adapters
        assert rows_of_adapters is not None
        assert rows_of_adapters.slots is not None
        wanted = [-1 if slot is None else slot for slot in slots] + [-1] * (4 - len(slots))
        assert rows_of_adapters.slots.tolist() == wanted
    assert padded.batch(4).adapters is None


def test_without_a_capture_every_batch_runs_eagerly() -> None:
    model = random_llama("cpu", "reference")
    cache = KVCache(model.config, 4, 16, torch.float32, "cpu")
    batch = BatchBuilder(8, 2, 2, 16).build([BatchRow([5], 0, [1], 1), BatchRow([6, 7], 0, [2], 1)])
    graphs = DecodeGraphs(model, cache, 4, 2)
    assert not graphs.can_capture(model)
    assert torch.equal(graphs.forward(batch), model.forward(batch, cache))


@pytest.mark.usefixtures("flashinfer")
@torch.inference_mode()
def test_replayed_rows_go_through_the_adapters_of_their_step(
    tapes: list[Tape], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapters, "_by_token", lambda device: by_token)
    monkeypatch.setattr(adapters, "_kernel", lambda slots: None)
    model = graphable_llama()
    model.make_adapter_slots(3, 4)
    cache = KVCache(model.config, 20, 16, torch.bfloat16, "cpu")
    builder = BatchBuilder(64, 8, 4, 16)
    graphs = DecodeGraphs(model, cache, 6, 4)
    graphs.capture()  # with empty slots, as at the start
    assert len(tapes) == 2 * len(graphs.buckets)
    fill_slot(model, 0, ["o_proj"], rank=4)
    fill_slot(model, 2, ["down_proj", "v_proj"], rank=2)

    def logits(slots: list[int | None], *, replayed: bool) -> Tensor:
        rows = [BatchRow([7 + i], 0, [1 + i], 1, adapter=slot) for i, slot in enumerate(slots)]
        batch = builder.build(rows)
        return graphs.forward(batch) if replayed else model.forward(batch, cache)

    for slots in ([0, 2, None], [2], [None, None], [2, 2, 2, 0, None, 1], [None, 0]):
        found = logits(slots, replayed=True)
        torch.testing.assert_close(found, logits(slots, replayed=False), atol=0.02, rtol=0.02)
        bare = logits([None] * len(slots), replayed=False)
        for row, slot in enumerate(slots):
            assert torch.equal(found[row], bare[row]) == (slot in (None, 1)), "slot 1 is empty"
    assert sum(tape.replays for tape in tapes) == 5
    fill_slot(model, 2, [], rank=1)
    assert torch.equal(logits([2], replayed=True), logits([None], replayed=True))


def fill_slot(model: Llama, slot: int, modules: list[str], rank: int) -> None:
    generator = torch.Generator().manual_seed(slot)
    weights = {}
    for name, projection in model.projections().items():
        if name.rpartition(".")[2] in modules:
            outputs, inputs = projection.shape
            down, up = (torch.randn(rank, n, generator=generator) for n in (inputs, outputs))
            weights[name] = LowRank(down.bfloat16() * 0.2, up.bfloat16() * 0.2)
    model.fill_adapter_slot(slot, Adapter(weights))


@pytest.mark.usefixtures("flashinfer")
@torch.inference_mode()
def test_a_bucket_without_adapters_does_not_serve_rows_with_them(tapes: list[Tape]) -> None:
    """Where the device cannot tell slots apart by itself, such batches are not captured."""
    model = graphable_llama()
    model.make_adapter_slots(1, 4)
    fill_slot(model, 0, ["o_proj"], rank=4)
    cache = KVCache(model.config, 4, 16, torch.bfloat16, "cpu")
    graphs = DecodeGraphs(model, cache, 4, 2)
    graphs.capture()
    assert len(tapes) == len(graphs.buckets)
    builder = BatchBuilder(8, 2, 2, 16)
    batch = builder.build([BatchRow([5], 0, [1], 1, adapter=0)])
    assert torch.equal(graphs.forward(batch), model.forward(batch, cache))
    assert not any(tape.replays for tape in tapes)
    graphs.forward(builder.build([BatchRow([5], 0, [1], 1)]))
    assert sum(tape.replays for tape in tapes) == 1
