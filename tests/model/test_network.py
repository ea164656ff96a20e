"""The network says what transformers' says, whatever way its tokens are fed."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from model.batch import BatchRow
from model.config import ModelConfig
from model.kv_cache import KVCache
from model.layers import can_pack, pack_for_onednn
from model.llama import Llama
from model.parallel import ParallelGroup
from tests.model.networks import NETWORKS, network
from tests.model.sequences import Fed, ours, random_tokens, reference_greedy, reference_logits

TOLERANCE = 1e-4
BACKENDS = ("reference", "cpu", "sdpa")


@pytest.fixture(params=NETWORKS)
def reference(request: pytest.FixtureRequest) -> PreTrainedModel:
    return network(request.param)


def close(mine: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(mine, wanted, atol=TOLERANCE, rtol=0)


# --------------------------------------------------------------------------- equal to transformers


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_equal_transformers(reference: PreTrainedModel, backend: str) -> None:
    tokens = random_tokens(100)
    close(Fed(ours(reference, backend)).logits(tokens), reference_logits(reference, tokens))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunks", [(1,) * 12, (40, 1, 17), (16, 16, 16), (3, 64)])
def test_chunks_change_nothing(backend: str, chunks: tuple[int, ...]) -> None:
    for name in ("llama", "mistral-window", "rope-yarn"):
        reference, tokens = network(name), random_tokens(90)
        fed = Fed(ours(reference, backend), block_size=4)
        close(fed.logits(tokens, chunks), reference_logits(reference, tokens))


@pytest.mark.parametrize("block_size", [1, 4, 64, 256])
def test_size_of_pages_changes_nothing(block_size: int) -> None:
    reference, tokens = network("qwen2-windows"), random_tokens(90)
    fed = Fed(ours(reference), block_size=block_size)
    close(fed.logits(tokens, (50, 1, 20)), reference_logits(reference, tokens))


def test_greedy_text_equals_transformers_in_a_mixed_batch(reference: PreTrainedModel) -> None:
    prompts = [random_tokens(size, seed=size) for size in (1, 5, 33, 64, 90)]
    texts = Fed(ours(reference), block_size=8).greedy(prompts, 16, chunk=20)
    assert texts == [reference_greedy(reference, prompt, 16) for prompt in prompts]


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("name", ["llama-three-kv-heads", "mistral-window", "qwen3"])
def test_every_backend_gives_the_same_text(name: str, backend: str) -> None:
    prompts = [random_tokens(size, seed=size) for size in (2, 31, 70)]
    texts = Fed(ours(network(name), backend)).greedy(prompts, 20, chunk=30)
    assert texts == Fed(ours(network(name), "cpu")).greedy(prompts, 20, chunk=11)


def test_dynamic_rope_equals_transformers_beyond_the_trained_context() -> None:
    reference, prompt = network("rope-dynamic"), random_tokens(120)
    text = Fed(ours(reference)).greedy([prompt], 40)[0]  # its context is 128
    assert text == reference_greedy(reference, prompt, 40)


# --------------------------------------------------------------------------- pages


def test_shared_prefix_pages_serve_many_rows() -> None:
    reference = network("llama-three-kv-heads")
    fed, prefix = Fed(ours(reference), block_size=8), random_tokens(40)
    shared = fed.table(40)
    fed.step([BatchRow(prefix, 0, shared, 0)])
    texts = [prefix + random_tokens(1 + size, seed=size) for size in range(6)]
    tables = [fed.table(len(text), shared) for text in texts]
    for text, table in zip(texts, tables, strict=True):
        if len(text) > 41:
            fed.step([BatchRow(text[40:-1], 40, table, 0)])
    rows = [
        BatchRow(text[-1:], len(text) - 1, table, 1)
        for text, table in zip(texts, tables, strict=True)
    ]
    close(fed.step(rows), torch.stack([reference_logits(reference, text)[-1] for text in texts]))


def test_a_copied_page_continues_another_text() -> None:
    reference, tokens = network("llama"), random_tokens(30)
    fed = Fed(ours(reference), block_size=16)
    table = fed.table(30)
    fed.step([BatchRow(tokens, 0, table, 0)])
    (own,) = fed.table(16)
    fed.cache.copy([(table[1], own, 10)])
    other = [*tokens[:26], 7]
    logits = fed.step([BatchRow([7], 26, [table[0], own], 1)])
    close(logits, reference_logits(reference, other)[-1:])
    again = fed.step([BatchRow([9], 30, table, 1)])
    close(again, reference_logits(reference, [*tokens, 9])[-1:])


# --------------------------------------------------------------------------- what is asked for


def test_only_wanted_logits_come_in_their_order() -> None:
    reference = network("llama")
    fed, texts = Fed(ours(reference)), [random_tokens(size, seed=size) for size in (1, 9, 12)]
    rows = [
        BatchRow(text, 0, fed.table(len(text)), wanted)
        for text, wanted in zip(texts, (1, 3, 0), strict=True)
    ]
    logits = fed.step(rows)
    assert logits.dtype == torch.float32
    close(logits[:1], reference_logits(reference, texts[0]))
    close(logits[1:], reference_logits(reference, texts[1])[-3:])


def test_no_logits_may_be_wanted() -> None:
    fed = Fed(ours(network("llama")))
    assert fed.step([BatchRow([1, 2, 3], 0, fed.table(3), 0)]).shape == (0, 96)


def test_taps_read_the_stream_before_and_after_every_layer() -> None:
    reference, tokens = network("llama"), random_tokens(10)
    fed, seen = Fed(ours(reference)), {}
    fed.step([BatchRow(tokens, 0, fed.table(10), 1)], lambda at, x: seen.update({at: x.clone()}))
    with torch.inference_mode():
        states = reference(torch.tensor([tokens]), output_hidden_states=True).hidden_states
    assert list(seen) == [0, 1, 2]
    close(seen[0], states[0][0])
    close(seen[1], states[1][0])
    close(reference.model.norm(seen[2]), states[2][0])


def test_taps_replace_the_stream() -> None:
    fed, tokens = Fed(ours(network("llama"))), random_tokens(10)
    plain = fed.step([BatchRow(tokens, 0, fed.table(10), 1)])
    kept = fed.step([BatchRow(tokens, 0, fed.table(10), 1)], lambda at, x: None)
    moved = fed.step([BatchRow(tokens, 0, fed.table(10), 1)], lambda at, x: x + (at == 1))
    assert torch.equal(plain, kept)
    assert not torch.allclose(plain, moved, atol=0.01)


def test_parameters_are_counted_as_transformers_counts_them(reference: PreTrainedModel) -> None:
    model = ours(reference)
    assert model.num_parameters == reference.num_parameters()
    assert model.weight_bytes == 4 * model.num_parameters


# --------------------------------------------------------------------------- bfloat16


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("name", ["llama", "llama-biases", "llama-tied", "qwen3", "mistral-window"])
def test_bfloat16_stays_near_float32(name: str, compiled: bool) -> None:
    reference, tokens = network(name), random_tokens(60)
    config = ModelConfig.from_huggingface(reference.config.to_dict())
    model, stored = Llama(config, torch.bfloat16), reference.state_dict()
    for slot_name, slot in model.slots().items():
        slot.fill(stored[slot_name])
    model.pack(compiled=compiled)
    logits = Fed(model).logits(tokens, (30, *[1] * 10))
    wanted = reference_logits(reference, tokens)
    assert float((logits - wanted).norm() / wanted.norm()) < 0.03


def test_packed_linear_layers_equal_unpacked_ones() -> None:
    model = Llama(
        ModelConfig.from_huggingface(network("llama-biases").config.to_dict()), torch.bfloat16
    )
    linear = model.layers[0].attention.qkv
    if not can_pack(torch.empty(0, dtype=torch.bfloat16)):
        pytest.skip("this PyTorch packs no bfloat16")
    for slot in model.slots().values():
        slot.fill(torch.randn(slot.shape))
    inputs = [torch.randn(rows, 64).bfloat16() for rows in (1, 2, 8, 31, 200)]
    plain = [linear(x) for x in inputs]
    linear.pack(pack_for_onednn)
    assert linear.weight.is_meta
    for x, wanted in zip(inputs, plain, strict=True):
        torch.testing.assert_close(linear(x), wanted, atol=0.02, rtol=0.02)


# --------------------------------------------------------------------------- several ranks


@dataclass(frozen=True)
class ThreadGroup(ParallelGroup):
    """Ranks that are threads of this process."""

    barrier: threading.Barrier = field(default_factory=lambda: threading.Barrier(1))
    board: dict[int, Tensor] = field(default_factory=dict)

    def _exchange(self, x: Tensor) -> list[Tensor]:
        self.board[self.rank] = x.clone()
        self.barrier.wait()
        parts = [self.board[rank] for rank in range(self.size)]
        self.barrier.wait()
        return parts

    def all_reduce(self, x: Tensor) -> Tensor:
        return torch.stack(self._exchange(x)).sum(0)

    def gather_columns(self, x: Tensor) -> Tensor:
        return torch.cat(self._exchange(x), dim=-1)


@pytest.mark.parametrize("name", ["llama", "llama-biases", "llama-tied", "qwen2", "qwen3"])
def test_two_ranks_say_what_one_says(name: str) -> None:
    reference, tokens = network(name), random_tokens(20)
    barrier, board, answers = threading.Barrier(2, timeout=60), {}, {}

    def run(rank: int) -> None:
        group = ThreadGroup(rank, 2, None, barrier, board)
        config = ModelConfig.from_huggingface(reference.config.to_dict())
        model = Llama(config, torch.float32, group=group)
        stored = reference.state_dict()
        for slot_name, slot in model.slots().items():
            slot.fill(stored[slot_name])
        fed = Fed(model)
        fed.cache = KVCache(config, 8, 16, torch.float32, "cpu", group)
        fed.free = list(range(1, 8))
        answers[rank] = fed.logits(tokens, (12,))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for rank in range(2):
        close(answers[rank], reference_logits(reference, tokens))


def test_heads_that_do_not_divide_are_refused() -> None:
    config = ModelConfig.from_huggingface(network("llama-one-kv-head").config.to_dict())
    with pytest.raises(ValueError, match="cannot be shared by 2 ranks"):
        Llama(config, torch.float32, group=ParallelGroup(0, 2))
