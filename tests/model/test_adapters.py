"""Rows that go through adapters say what the network with merged weights says; others do not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from model.adapters import LONG_RUN, AdapterRows, Run, runs_of, token_slots
from model.batch import BatchRow
from model.kernels import kernel_library
from model.kernels.lora import lora_kernel
from model.layers import Linear, RMSNorm
from model.llama import Llama
from model.lora import Adapter, LowRank, read_adapter
from model.parallel import ParallelGroup
from tests.model.adapter_cases import RUNS, expected, random_slots
from tests.model.networks import network
from tests.model.peft_folders import ALL, merged, random_adapter, tensors_of, write_folder
from tests.model.random_llama import random_llama
from tests.model.sequences import Fed, ours, random_tokens, reference_logits
from tests.model.test_attention_triton import TRITON_MISSING

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("llama", "llama-three-kv-heads", "llama-biases", "qwen2", "qwen3", "llama-tied")


def shapes(model: Llama) -> dict[str, tuple[int, int]]:
    return {name: one.shape for name, one in model.projections().items()}


def adapted(
    reference: PreTrainedModel, folder: Path, slots: int = 2, max_rank: int = 8, slot: int = 0
) -> Llama:
    model = ours(reference)
    model.make_adapter_slots(slots, max_rank)
    model.fill_adapter_slot(slot, read_adapter(folder, shapes(model), max_rank, model.dtype))
    return model


def close(mine: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(mine, wanted, atol=1e-4, rtol=0)


# --------------------------------------------------------------------------- what it adds


@pytest.mark.parametrize("name", NAMES)
def test_an_adapted_row_says_what_the_merged_network_says(name: str, tmp_path: Path) -> None:
    reference, tokens = network(name), random_tokens(60)
    adapter = random_adapter(reference)
    model = adapted(reference, write_folder(tmp_path, tensors_of(adapter)))
    fed = Fed(model)
    found = fed.step([BatchRow(tokens, 0, fed.table(60), 60, adapter=0)])
    wanted = reference_logits(merged(reference, adapter, 2.0), tokens)
    assert (wanted - reference_logits(reference, tokens)).abs().max() > 0.1
    close(found, wanted)


@pytest.mark.parametrize("target", ALL)
def test_each_part_of_a_fused_layer_can_be_adapted_alone(target: str, tmp_path: Path) -> None:
    reference, tokens = network("llama-three-kv-heads"), random_tokens(40)
    adapter = random_adapter(reference, [target])
    folder = write_folder(tmp_path, tensors_of(adapter), target_modules=[target])
    fed = Fed(adapted(reference, folder))
    found = fed.step([BatchRow(tokens, 0, fed.table(40), 40, adapter=0)])
    close(found, reference_logits(merged(reference, adapter, 2.0), tokens))


def test_ranks_and_alphas_may_differ_from_part_to_part(tmp_path: Path) -> None:
    reference, tokens = network("llama"), random_tokens(30)
    modules = random_adapter(reference, ["q_proj", "v_proj", "down_proj"])
    ranks = {name: 2 if name.endswith("v_proj") else 4 for name in modules}
    ranks["model.layers.1.mlp.down_proj"] = 7
    adapter = random_adapter(reference, ["q_proj", "v_proj", "down_proj"], ranks=ranks)
    folder = write_folder(
        tmp_path,
        tensors_of(adapter),
        target_modules=["q_proj", "v_proj", "down_proj"],
        rank_pattern={"v_proj": 2, "model.layers.1.mlp.down_proj": 7},
        alpha_pattern={r".*\.0\.self_attn.q_proj": 3, "down_proj": 5.5},
        use_rslora=True,
    )
    alphas = {name: 5.5 if "down" in name else 8.0 for name in adapter}
    alphas["model.layers.0.self_attn.q_proj"] = 3.0
    scale = {name: alphas[name] / ranks[name] ** 0.5 for name in adapter}
    fed = Fed(adapted(reference, folder))
    found = fed.step([BatchRow(tokens, 0, fed.table(30), 30, adapter=0)])
    close(found, reference_logits(merged(reference, adapter, scale), tokens))


def test_rows_of_many_adapters_and_none_share_a_step(tmp_path: Path) -> None:
    """Decodes and chunks, short and long ones, of three adapters and of the base."""
    reference = network("llama-three-kv-heads")
    model = ours(reference)
    model.make_adapter_slots(3, 8)
    networks: dict[int | None, PreTrainedModel] = {None: reference}
    for slot in range(3):
        adapter = random_adapter(reference, ALL[slot:], rank=2 + slot, seed=slot)
        folder = write_folder(
            tmp_path / str(slot),
            tensors_of(adapter),
            target_modules=list(ALL[slot:]),
            r=2 + slot,
        )
        model.fill_adapter_slot(slot, read_adapter(folder, shapes(model), 8, model.dtype))
        networks[slot] = merged(reference, adapter, 8 / (2 + slot))
    fed = Fed(model)
    singles: list[int | None] = [None, None, 0, 0, 1, 2]
    chunks = [(None, 9), (0, 40), (1, 3), (2, 50), (None, 34)]
    texts = [random_tokens(20 + i, seed=i) for i in range(len(singles))]
    tables = [fed.table(len(text)) for text in texts]
    for text, table, slot in zip(texts, tables, singles, strict=True):
        fed.step([BatchRow(text[:-1], 0, table, 0, adapter=slot)])
    rows = [
        BatchRow(text[-1:], len(text) - 1, table, 1, adapter=slot)
        for text, table, slot in zip(texts, tables, singles, strict=True)
    ]
    for slot, size in chunks:
        texts.append(random_tokens(size, seed=size))
        rows.append(BatchRow(texts[-1], 0, fed.table(size), 1, adapter=slot))
    found = fed.step(rows)
    for row, text, logits in zip(rows, texts, found, strict=True):
        close(logits, reference_logits(networks[row.adapter], text)[-1])


def test_rows_without_an_adapter_are_the_same_bits_beside_those_with_one(tmp_path: Path) -> None:
    reference = network("llama")
    folder = write_folder(tmp_path, tensors_of(random_adapter(reference)))
    with_slots, plain = Fed(adapted(reference, folder)), Fed(ours(reference))
    found = []
    for fed, slot in ((with_slots, 0), (plain, None)):
        tables = [fed.table(8) for _ in range(4)]
        slots = [None, None, slot, slot]
        found.append(
            fed.step([BatchRow([5 + i], 0, tables[i], 1, adapter=slots[i]) for i in range(4)])
        )
    assert torch.equal(found[0][:2], found[1][:2])
    assert not torch.equal(found[0][2:], found[1][2:])


def test_a_slot_filled_anew_forgets_what_it_held(tmp_path: Path) -> None:
    """Of higher rank and more parts: nothing of it may shine through."""
    reference, tokens = network("llama"), random_tokens(20)
    first = random_adapter(reference, rank=8)
    second = random_adapter(reference, ["k_proj", "up_proj"], rank=3, seed=5)
    model = adapted(reference, write_folder(tmp_path / "a", tensors_of(first), r=8))
    folder = write_folder(
        tmp_path / "b", tensors_of(second), r=3, target_modules=["k_proj", "up_proj"]
    )
    model.fill_adapter_slot(0, read_adapter(folder, shapes(model), 8, model.dtype))
    fed = Fed(model)
    found = fed.step([BatchRow(tokens, 0, fed.table(20), 20, adapter=0)])
    close(found, reference_logits(merged(reference, second, 8 / 3), tokens))


# --------------------------------------------------------------------------- the compiled kernel


needs_kernel = pytest.mark.skipif(
    kernel_library() is None, reason="no compiled kernels on this machine"
)


@needs_kernel
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(
    ("inputs", "parts"), [(576, (576, 192, 192)), (64, (64,)), (100, (70, 70)), (1536, (90,))]
)
def test_the_kernel_adds_what_matrix_products_add(
    inputs: int, parts: tuple[int, ...], threads: int
) -> None:
    slots, generator = random_slots(torch.bfloat16, parts, inputs), torch.Generator().manual_seed(0)
    kernel = lora_kernel(slots, threads)
    assert kernel is not None
    x = torch.randn(31, inputs, generator=generator).bfloat16()
    out = torch.randn(31, sum(parts), generator=generator).bfloat16()
    wanted = expected(x, out, slots, RUNS)
    before = out.clone()
    kernel.add(x, out, AdapterRows(RUNS))
    torch.testing.assert_close(out.double(), wanted, atol=0.02, rtol=0.01)
    for untouched in (0, 9, 10, 30):
        assert torch.equal(out[untouched], before[untouched])


def norm_of(size: int) -> RMSNorm:
    norm = RMSNorm(size, 1e-5, torch.bfloat16, torch.device("cpu"))
    norm.slot().fill(torch.randn(size, generator=torch.Generator().manual_seed(4)))
    return norm


@needs_kernel
def test_the_kernel_normalizes_what_comes_before_a_norm() -> None:
    slots, norm = random_slots(torch.bfloat16, (64, 64), 576), norm_of(576)
    kernel = lora_kernel(slots, 2)
    assert kernel is not None
    x, out = 3 * torch.randn(31, 576).bfloat16(), torch.zeros(31, 128).bfloat16()
    wanted = expected(norm(x), out, slots, RUNS)
    kernel.add(x, out, AdapterRows(RUNS), norm)
    torch.testing.assert_close(out.double(), wanted, atol=0.03, rtol=0.02)


@needs_kernel
def test_a_row_is_the_same_bits_whatever_run_it_stands_in() -> None:
    slots = random_slots(torch.bfloat16, (576, 192, 192), 576)
    kernel, norm = lora_kernel(slots, 2), norm_of(576)
    assert kernel is not None
    x, start = torch.randn(9, 576).bfloat16(), torch.randn(9, 960).bfloat16()
    together = start.clone()
    kernel.add(x, together, AdapterRows([Run(1, 0, 9)]), norm)
    for row in range(9):
        alone = start[row : row + 1].clone()
        kernel.add(x[row : row + 1].contiguous(), alone, AdapterRows([Run(1, 0, 1)]), norm)
        assert torch.equal(alone[0], together[row])


@needs_kernel
def test_compiled_decodes_go_through_adapters_and_leave_others_alone() -> None:
    """As close to float32 with adapters as without; rows without one are the same bits."""
    wide, model = random_llama("cpu"), random_llama("cpu", dtype=torch.bfloat16)
    if model.compiled is None:
        pytest.skip("no compiled path")
    generator = torch.Generator().manual_seed(3)
    weights = {
        name: LowRank(
            torch.randn(8, one.shape[1], generator=generator) * 0.1,
            torch.randn(8, one.shape[0], generator=generator) * 0.05,
        )
        for name, one in model.projections().items()
    }
    logits = {}
    for network_, dtype in ((wide, torch.float32), (model, torch.bfloat16)):
        network_.make_adapter_slots(2, 8)
        own = {n: LowRank(w.down.to(dtype), w.up.to(dtype)) for n, w in weights.items()}
        network_.fill_adapter_slot(1, Adapter(own))
        for adapters in ([None] * 4, [None, None, 1, 1]):
            fed = Fed(network_, block_size=32)
            tables = [fed.table(8) for _ in range(4)]
            for token in range(3):
                rows = [
                    BatchRow([9 + token + i], token, tables[i], 1, adapter=adapters[i])
                    for i in range(4)
                ]
                found = fed.step(rows)
            logits[dtype, adapters[3]] = found
    narrow, exact = torch.bfloat16, torch.float32
    assert torch.equal(logits[narrow, 1][:2], logits[narrow, None][:2])
    rounding = (logits[narrow, None] - logits[exact, None]).abs().max()
    assert (logits[exact, 1] - logits[exact, None])[2:].abs().max() > 4 * rounding
    assert (logits[narrow, 1] - logits[exact, 1]).abs().max() < 2 * rounding


# --------------------------------------------------------------------------- which rows


def test_neighbouring_rows_of_one_slot_are_one_run() -> None:
    slots = [None, 0, 0, 1, None, 1, 1]
    lengths = [1, 1, 2, 1, 5, LONG_RUN + 1, 3]
    runs = runs_of(slots, lengths)
    assert runs == [
        Run(0, 1, 4),
        Run(1, 4, 5),
        Run(1, 10, 11 + LONG_RUN),
        Run(1, 11 + LONG_RUN, 14 + LONG_RUN),
    ]
    tokens = token_slots(runs, 14 + LONG_RUN)
    assert tokens[:11] == [-1, 0, 0, 0, 1, -1, -1, -1, -1, -1, -1]
    assert tokens[-4:] == [-1, 1, 1, 1]


# --------------------------------------------------------------------------- ranks of a group


def test_many_rows_of_one_token_are_never_a_long_run() -> None:
    """However many go through one slot: a CUDA graph serves short runs alone."""
    runs = runs_of([3] * 100, [1] * 100)
    assert [run.end - run.first for run in runs] == [LONG_RUN] * 3 + [4]
    assert token_slots(runs, 100) == [3] * 100


@pytest.mark.parametrize("by_rows", [False, True])
def test_shares_of_an_adapter_come_to_the_whole(by_rows: bool) -> None:
    parts, inputs, ranks = (8, 4, 4), 12, 2
    if by_rows:
        parts = (10,)
    generator = torch.Generator().manual_seed(2)
    weights = {
        part: LowRank(
            torch.randn(3, inputs, generator=generator), torch.randn(3, size, generator=generator)
        )
        for part, size in enumerate(parts)
    }
    x, shares = torch.randn(5, inputs, generator=generator), []
    for rank in range(ranks):
        linear = Linear(
            inputs,
            parts,
            dtype=torch.float32,
            device=torch.device("cpu"),
            group=ParallelGroup(rank, ranks),
            by_rows=by_rows,
        )
        linear.make_adapter_slots(1, 4, torch.float32)
        linear.fill_adapter_slot(0, weights)
        own = x.chunk(ranks, 1)[rank] if by_rows else x
        out = torch.zeros(5, sum(parts) if by_rows else sum(parts) // ranks)
        linear.add_adapters(own, out, AdapterRows([Run(0, 0, 5)]))
        shares.append(out)
    whole = torch.cat([x @ one.down.t() @ one.up for one in weights.values()], 1)
    if by_rows:
        torch.testing.assert_close(shares[0] + shares[1], whole)
    else:
        sizes = [size // ranks for size in parts]
        split = [share.split(sizes, 1) for share in shares]
        joined = [torch.cat(columns, 1) for columns in zip(*split, strict=True)]
        torch.testing.assert_close(torch.cat(joined, 1), whole)


# --------------------------------------------------------------------------- Triton


@pytest.mark.skipif(TRITON_MISSING, reason="Triton is not installed")
def test_triton_adapters_equal_matrix_products_under_the_interpreter() -> None:
    """In a process of its own: Triton reads its switch when it is imported."""
    cases = Path(__file__).with_name("triton_adapter_cases.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases)]
    interpreted = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(command, cwd=ROOT, env=interpreted, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4_000:] + run.stderr[-2_000:]


@pytest.mark.skipif(TRITON_MISSING, reason="Triton is not installed")
@pytest.mark.parametrize("architecture", [80, 90])
def test_kernels_compile_for_gpus_that_are_not_here(
    architecture: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from model import adapters_triton as kernels

    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    pointers = {"x": "*bf16", "down": "*bf16", "up": "*bf16", "out": "*bf16", "hidden": "*fp32"}
    pointers |= {"token_slots": "*i32", "slots": "*i32"}
    for kernel, fixed in (
        (kernels._shrink, {"PARTS": 3, "SMALL": kernels.SMALL, "WIDE": kernels.WIDE}),
        (kernels._expand, {"PARTS": 3, "OUTPUTS": kernels.OUTPUTS}),
    ):
        signature = {
            name: "constexpr" if name in fixed else pointers.get(name, "i32")
            for name in kernel.arg_names
        }
        source = ASTSource(fn=kernel, signature=signature, constexprs=fixed)
        target = GPUTarget("cuda", architecture, 32)
        compiled = triton.compile(source, target=target, options=kernels._OPTIONS)
        assert compiled.asm["cubin"]
