"""The CUDA attention backends against plain float32 attention, on the device."""

from __future__ import annotations

import pytest
import torch

from model import attention_cuda
from model.attention_cuda import Attend
from tests.model.paged_reference import PagedCase, random_case, reference

DECODES = [(1, 5), (1, 256), (1, 257), (1, 1), (1, 3_000), (1, 700)]
CHUNKS = [(3, 3), (7, 400), (513, 513), (256, 768)]
BACKENDS = ["triton", "varlen", "flashinfer"]
TOLERANCES = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def backend_named(name: str, dtype: torch.dtype = torch.bfloat16, head_size: int = 64) -> Attend:
    if name == "flashinfer":
        refusal = attention_cuda.flashinfer_refusal(dtype, head_size)
        if refusal:
            pytest.skip(f"flashinfer: {refusal}")
        return attention_cuda.flashinfer_attention
    available, attend = {
        "triton": (attention_cuda.triton_available, attention_cuda.triton_attention),
        "varlen": (attention_cuda.varlen_available, attention_cuda.varlen_attention),
    }[name]
    if not available():
        pytest.skip(f"{name} attention is not available here")
    return attend


def check(case: PagedCase, dtype: torch.dtype, name: str, window: int | None = None) -> None:
    attend = backend_named(name, dtype, case.q.size(2))
    moved = case.to("cuda", dtype)
    out = attend(moved.q, moved.k_pages, moved.v_pages, moved.batch, moved.scale, window)
    assert out.dtype == dtype
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(
        out.float(), reference(moved, window), atol=tolerance, rtol=tolerance
    )


def test_triton_runs_and_is_right_on_this_device() -> None:
    pytest.importorskip("triton")
    assert attention_cuda.triton_available(), "see the warning in the log"


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [DECODES, CHUNKS, DECODES + CHUNKS, [(1, 1)], [(2, 2)]])
def test_half_precision_equals_plain_attention(
    name: str, dtype: torch.dtype, rows: list[tuple[int, int]]
) -> None:
    check(random_case(rows, page=256, unread=0.0), dtype, name)


@pytest.mark.parametrize("page", [16, 48, 64, 256])
def test_triton_in_float32_and_any_page(page: int) -> None:
    check(random_case(DECODES + CHUNKS, page=page), torch.float32, "triton")


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("window", [1, 64, 100, 1_000])
def test_windows(name: str, window: int) -> None:
    case = random_case(DECODES + CHUNKS, page=256, unread=0.0)
    check(case, torch.bfloat16, name, window)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (9, 3), (32, 8), (32, 4), (64, 2), (6, 6)])
@pytest.mark.parametrize("head_size", [64, 80, 96, 128, 256])
def test_any_heads(name: str, heads: int, kv_heads: int, head_size: int) -> None:
    rows = [(1, 300), (1, 40), (60, 300)]
    case = random_case(
        rows, heads=heads, kv_heads=kv_heads, head_size=head_size, page=256, unread=0.0
    )
    check(case, torch.bfloat16, name)


@pytest.mark.parametrize("name", BACKENDS)
def test_long_contexts_and_shared_pages(name: str) -> None:
    rows = [(1, 40_000), (1, 33_000), (1, 513), (300, 20_000)]
    check(random_case(rows, page=256, shared_pages=2, unread=0.0), torch.bfloat16, name)


def test_triton_sums_a_row_in_the_same_order_alone_and_in_a_batch() -> None:
    attend = backend_named("triton")
    case = random_case([(1, 3_000)] * 40, page=256).to("cuda", torch.bfloat16)
    case.q[:] = case.q[0]
    case.batch.block_tables[:] = case.batch.block_tables[0].clone()
    pages = (case.k_pages, case.v_pages)
    together = attend(case.q, *pages, case.batch, case.scale, None)
    assert (together == together[0]).all()


@pytest.mark.parametrize("name", ["triton", "varlen"])
def test_a_captured_launch_serves_other_contexts(name: str) -> None:
    attend = backend_named(name)
    first = random_case([(1, 600)] * 8, page=256, unread=0.0).to("cuda", torch.bfloat16)
    pages = (first.k_pages, first.v_pages)
    attend(first.q, *pages, first.batch, first.scale, None)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(first.q, *pages, first.batch, first.scale, None)
    contexts = [1, 2, 255, 256, 257, 511, 512, 600]
    first.batch.context_lengths.copy_(torch.tensor(contexts, dtype=torch.int32))
    first.batch.contexts[:] = contexts
    graph.replay()
    torch.testing.assert_close(out.float(), reference(first), atol=3e-2, rtol=3e-2)


def test_flashinfer_is_right_on_this_device() -> None:
    pytest.importorskip("flashinfer")
    refusal = attention_cuda.flashinfer_refusal()
    assert refusal is None, "see the warning in the log"


@pytest.mark.parametrize("window", [None, 100])
def test_a_captured_flashinfer_launch_serves_the_rows_planned_for_it(window: int | None) -> None:
    backend_named("flashinfer")
    from model.attention_flashinfer import FlashInfer, Problem

    contexts = [(1, 1), (1, 2), (1, 255), (1, 256), (1, 257), (1, 3_000)]
    case = random_case(contexts, page=256, unread=0.0).to("cuda", torch.bfloat16)
    indices = torch.zeros(200, dtype=torch.int32, device="cuda")
    plans = FlashInfer(case.q.device).decode_plans(8, indices)
    q = torch.zeros(8, *case.q.shape[1:], dtype=case.q.dtype, device="cuda")
    problem = Problem.of(q, case.k_pages, case.scale, window)
    plans.attend(q, case.k_pages, case.v_pages, problem)  # compiles, and makes the wrapper
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = plans.attend(q, case.k_pages, case.v_pages, problem)
    wanted = reference(case, window)
    for rows in ([0, 1, 2, 3, 4, 5], [5], [4, 3]):
        q[: len(rows)] = case.q[rows]
        tables, lengths = case.batch.tables, case.batch.contexts
        plans.plan([tables[row] for row in rows], [lengths[row] for row in rows])
        graph.replay()
        found = out[: len(rows)].float()
        torch.testing.assert_close(found, wanted[rows], atol=3e-2, rtol=3e-2)


def test_flashinfer_plans_do_not_overwrite_each_other() -> None:
    """Many steps are planned while the device is still busy with the first."""
    backend_named("flashinfer")
    from model.attention_flashinfer import FlashInfer

    kept = FlashInfer(torch.device("cuda"))
    cases = [
        random_case([(1, 300 + 70 * seed)] * 4 + [(9, 40 + seed)], page=256, unread=0.0, seed=seed)
        for seed in range(8)
    ]
    cases = [case.to("cuda", torch.bfloat16) for case in cases]
    busy = torch.randn(8_192, 8_192, device="cuda")
    for _ in range(10):
        busy = busy @ busy.T / 8_192
    found = [
        kept.attend(case.q, case.k_pages, case.v_pages, case.batch, case.scale, None)
        for case in cases
    ]
    for case, out in zip(cases, found, strict=True):
        torch.testing.assert_close(out.float(), reference(case), atol=3e-2, rtol=3e-2)
