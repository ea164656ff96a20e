"""Run by test_attention_triton.py in a process of its own, where Triton interprets its kernels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model import attention_triton
from model.attention_cuda import triton_attention
from model.kv_format import dequantize, quantize
from tests.model.paged_reference import PagedCase, random_case, reference

DECODES = [(1, 5), (1, 16), (1, 17), (1, 1), (1, 90)]
CHUNKS = [(3, 3), (7, 40), (33, 33), (16, 48)]


def attend(case: PagedCase, window: int | None = None) -> Tensor:
    return triton_attention(case.q, case.k_pages, case.v_pages, case.batch, case.scale, window)


def check(case: PagedCase, window: int | None = None, tolerance: float = 1e-5) -> None:
    out = attend(case, window)
    torch.testing.assert_close(out.float(), reference(case, window), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("rows", [DECODES, CHUNKS, DECODES[:2] + CHUNKS[:2], [(1, 1)], [(2, 2)]])
@pytest.mark.parametrize("page", [16, 48, 128])
def test_decodes_chunks_and_mixtures_equal_plain_attention(
    rows: list[tuple[int, int]], page: int
) -> None:
    check(random_case(rows, page=page))


@pytest.mark.parametrize("window", [1, 4, 16, 33, 1_000])
def test_a_query_sees_only_its_window(window: int) -> None:
    check(random_case(DECODES + CHUNKS), window)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 3), (9, 3), (8, 1), (6, 2), (32, 1)])
def test_any_grouping_of_heads(heads: int, kv_heads: int) -> None:
    rows = [(1, 20), (5, 21)]
    check(random_case(rows, heads=heads, kv_heads=kv_heads, head_size=32))


@pytest.mark.parametrize("head_size", [64, 80, 96, 128, 160, 256])
def test_any_head_size(head_size: int) -> None:
    check(random_case([(1, 70), (4, 37)], heads=2, kv_heads=1, head_size=head_size))


def test_pages_shared_by_sequences() -> None:
    check(random_case([(1, 64), (1, 70), (9, 60)], shared_pages=2))


@pytest.mark.parametrize("window", [None, 200, 600])
def test_long_contexts_are_merged_from_splits(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_triton, "_MIN_SPLIT", 64)
    monkeypatch.setattr(attention_triton, "_MAX_SPLITS", 40)
    case = random_case([(1, 1_300), (1, 63), (1, 64), (1, 65)], heads=2, kv_heads=1, page=32)
    check(case, window)


def test_half_precision() -> None:
    case = random_case(DECODES[:3] + CHUNKS[:2]).to("cpu", torch.float16)
    check(case, tolerance=4e-3)


def test_queries_may_be_a_view_of_a_fused_projection() -> None:
    case = random_case(DECODES + CHUNKS)
    fused = torch.randn(case.q.size(0), case.q.size(1) + 4, case.q.size(2))
    fused[:, : case.q.size(1)] = case.q
    case.q = fused[:, : case.q.size(1)]
    check(case)


def test_padding_rows_of_no_context_come_out_as_zeros() -> None:
    case = random_case(DECODES)
    case.batch.context_lengths[3:] = 0
    out = attend(case)
    assert (out[3:] == 0).all()
    torch.testing.assert_close(out[:3], reference(case)[:3], atol=1e-5, rtol=1e-5)


def test_a_row_is_summed_in_the_same_order_alone_and_in_a_batch() -> None:
    case = random_case([(1, 90), (1, 17), (1, 90)])
    together = attend(case)
    for row in range(3):
        alone = torch.empty_like(case.q[:1])
        only = slice(row, row + 1)
        tables, contexts = case.batch.block_tables[only], case.batch.context_lengths[only]
        pages = (case.k_pages, case.v_pages)
        attention_triton.decode(case.q[only], *pages, tables, contexts, case.scale, None, alone)
        assert torch.equal(alone[0], together[row])


QUANTIZED = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("window", [None, 20])
def test_quantized_pages_are_read_as_what_they_hold(
    name: str, dtype: torch.dtype, window: int | None
) -> None:
    case = random_case(DECODES + CHUNKS, shared_pages=1)
    stored, scales = quantize(torch.stack((case.k_pages, case.v_pages)), QUANTIZED[name])
    q = case.q.to(dtype)
    out = triton_attention(q, *stored.unbind(), case.batch, case.scale, window, scales)
    case.k_pages, case.v_pages = dequantize(stored, scales, torch.float32)
    case.q = q.float()
    tolerance = 1e-5 if dtype == torch.float32 else 4e-3
    torch.testing.assert_close(out.float(), reference(case, window), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("head_size", [80, 128, 256])
@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_pages_of_any_shape(name: str, head_size: int) -> None:
    rows = [(1, 70), (1, 1), (4, 37)]
    case = random_case(rows, heads=6, kv_heads=2, head_size=head_size, page=48)
    stored, scales = quantize(torch.stack((case.k_pages, case.v_pages)), QUANTIZED[name])
    out = triton_attention(case.q, *stored.unbind(), case.batch, case.scale, None, scales)
    case.k_pages, case.v_pages = dequantize(stored, scales, torch.float32)
    torch.testing.assert_close(out, reference(case), atol=1e-5, rtol=1e-5)


def test_every_code_of_fp8_is_read_as_its_number() -> None:
    """One key of value 0 and one of each code: a lone value is what the answer is."""
    codes = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(torch.float8_e4m3fn)
    for half in (codes[:126], codes[128:254]):  # without NaN
        case = random_case([(1, 1)], heads=1, kv_heads=1, head_size=128, page=16)
        values = torch.zeros_like(case.v_pages).to(torch.float8_e4m3fn)
        page = int(case.batch.block_tables[0, 0])
        values.view(torch.uint8)[page, 0, 0, :126] = half.view(torch.uint8)
        keys = torch.zeros_like(values)
        out = triton_attention(case.q, keys, values, case.batch, case.scale, None)
        assert torch.equal(out[0, 0, :126], half.float())
