"""Each compiled kernel equals its PyTorch specification to bf16 rounding, for any size."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.kernels import (
    Kernels,
    KernelWeight,
    PagedRows,
    kernel_status,
    load_kernels,
    reference,
)
from model.kv_format import dequantize
from model.kv_format import quantize as quantize_pages
from model.quantization import QuantizedWeight, quantize

EPS = 1e-5


@pytest.fixture(params=[1, 2])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    loaded = load_kernels(threads=request.param)
    if loaded is None:
        pytest.skip(f"no kernels here: {kernel_status()[1]}")
    return loaded


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def draw(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape) * scale).bfloat16()


def close(mine: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(mine.float(), wanted.float(), rtol=2e-2, atol=2e-2)


ROWS = [1, 2, 5, 7, 12, 13, 100]


Weight = Tensor | QuantizedWeight
KINDS = ["bf16", "int8", "int8-zeros", "int4", "int4-zeros", "int4-sorted"]


def draw_weight(kind: str, outputs: int, inputs: int, scale: float) -> Weight:
    if kind == "bf16":
        return draw(outputs, inputs, scale=scale)
    bits = int(kind[3])
    weight = quantize(torch.randn(outputs, inputs) * scale, bits, 32)
    if kind.endswith("zeros"):
        middle = 1 << (bits - 1)
        zeros = torch.randint(middle - 2, middle + 3, weight.scales.shape, dtype=torch.uint8)
        return replace(weight, zeros=zeros)
    return replace(weight, order=torch.randperm(inputs)) if kind.endswith("sorted") else weight


def packed(kernels: Kernels, weight: Weight) -> KernelWeight:
    found = kernels.pack(weight)
    assert found is not None
    return found


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 96), (96, 33), (576, 960), (192, 7)])
@pytest.mark.parametrize("kind", KINDS)
def test_linear(kernels: Kernels, rows: int, inputs: int, outputs: int, kind: str) -> None:
    weight = draw_weight(kind, outputs, inputs, inputs**-0.5)
    ours = packed(kernels, weight)
    for norm, bias in ((None, None), (draw(inputs), draw(outputs))):
        x = draw(rows, inputs)
        for dtype in (torch.bfloat16, torch.float32):
            mine = kernels.linear(x, norm, ours, bias, EPS, dtype)
            assert mine.dtype == dtype
            close(mine, reference.linear(x, norm, weight, bias, EPS, dtype))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 96), (160, 64), (1536, 576), (32, 35)])
@pytest.mark.parametrize("kind", KINDS)
def test_linear_add(kernels: Kernels, rows: int, inputs: int, outputs: int, kind: str) -> None:
    x, bias = draw(rows, inputs), draw(outputs)
    weight = draw_weight(kind, outputs, inputs, inputs**-0.5)
    mine = draw(rows, outputs)
    wanted = mine.clone()
    kernels.linear_add(x, packed(kernels, weight), bias, mine)
    reference.linear_add(x, weight, bias, wanted)
    close(mine, wanted)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("inputs", "inner"), [(64, 160), (576, 1536), (32, 32)])
@pytest.mark.parametrize("kind", KINDS)
def test_gate_up(kernels: Kernels, rows: int, inputs: int, inner: int, kind: str) -> None:
    x, norm = draw(rows, inputs), draw(inputs)
    weight = draw_weight(kind, 2 * inner, inputs, 3 * inputs**-0.5)  # gates of both signs, large
    for bias in (None, draw(2 * inner)):
        mine = kernels.gate_up(x, norm, packed(kernels, weight), bias, EPS)
        torch.testing.assert_close(
            mine.float(),
            reference.gate_up(x, norm, weight, bias, EPS).float(),
            rtol=2e-2,
            atol=4e-2,
        )


def test_what_the_kernels_do_not_take_is_not_packed(kernels: Kernels) -> None:
    assert kernels.pack(torch.zeros(32, 64)) is None  # float32
    assert kernels.pack(draw(32, 33)) is None  # bf16 is multiplied in pairs
    assert kernels.pack(quantize(torch.randn(8, 24), 8, 8)) is None  # groups of whole vectors


def test_rows_of_a_packed_matrix_are_what_went_in(kernels: Kernels) -> None:
    table = draw(100, 64)
    numbers = torch.tensor([0, 99, 31, 32, 7, 7])
    assert torch.equal(packed(kernels, table).panels.rows(numbers), table[numbers])


@pytest.mark.parametrize("head_size", [32, 48, 64, 80, 96, 128, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (9, 3), (8, 2), (14, 2), (5, 1)])
@pytest.mark.parametrize("window", [None, 7])
def test_paged_attention(
    kernels: Kernels, head_size: int, heads: int, kv_heads: int, window: int | None
) -> None:
    contexts = [1, 5, 32, 33, 150, 64]
    check_attention(kernels, head_size, heads, kv_heads, window, contexts, page_size=32)
    lengths = [1, 1, 2, 33, 70, 64]  # two lone tokens, then chunks with and without a history
    check_attention(
        kernels, head_size, heads, kv_heads, window, contexts, page_size=32, lengths=lengths
    )


@pytest.mark.parametrize("contexts", [[1], [700], [2000], [129, 1999]])
def test_a_long_context_is_cut_into_parts_and_merged(kernels: Kernels, contexts: list[int]) -> None:
    check_attention(kernels, 64, 3, 1, None, contexts, page_size=256)
    check_attention(kernels, 64, 3, 1, 500, contexts, page_size=256)


@pytest.mark.parametrize("window", [None, 100])
def test_chunks_of_long_prompts(kernels: Kernels, window: int | None) -> None:
    check_attention(kernels, 64, 3, 1, window, [9, 700, 300], page_size=256, lengths=[1, 129, 300])


def test_queries_and_keys_are_normed_where_the_network_asks(kernels: Kernels) -> None:
    check_attention(kernels, 64, 8, 2, None, [3, 40], page_size=32, normed=True)
    check_attention(kernels, 64, 8, 2, None, [3, 40], page_size=32, normed=True, lengths=[1, 20])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize("lengths", [[1, 1, 1], [1, 40, 300]])
def test_quantized_pages_are_written_and_read_as_the_cache_does(
    kernels: Kernels, dtype: torch.dtype, lengths: list[int]
) -> None:
    contexts, tables = [7, 90, 300], torch.arange(1, 16).view(3, 5).int()
    angles = torch.rand(sum(lengths), 24) * 6
    rows = paged_rows(angles, tables, contexts, lengths)
    qkv = draw(sum(lengths), 8 * 48, scale=3.0)
    wide = [draw(16, 2, 64, 48) for _ in range(2)]
    stored = [quantize_pages(each, dtype) for each in wide]
    key_scales, value_scales = (scales for _, scales in stored)
    mine = kernels.paged_attention(
        qkv,
        stored[0][0],
        stored[1][0],
        rows,
        scale=0.15,
        key_scales=key_scales,
        value_scales=value_scales,
    )
    read = [dequantize(*each, torch.bfloat16) for each in stored]
    fresh = [each.clone() for each in read]  # the new tokens are in there already: written again
    wanted = reference.paged_attention(qkv, *fresh, rows, scale=0.15)
    lost = float((mine.float() - wanted.float()).norm() / wanted.float().norm())
    assert lost < (0.1 if dtype.is_floating_point else 0.02)
    for own, plain in zip(read, fresh, strict=True):
        step = plain.float().abs().amax(-1, keepdim=True) / (16 if dtype.is_floating_point else 126)
        assert bool(((own.float() - plain.float()).abs() <= step).all())


def test_bits_of_quantized_pages_are_the_caches_own(kernels: Kernels) -> None:
    """A page written by the kernels may be read by PyTorch and the other way round."""
    values = torch.cat(
        (torch.tensor([0.0, 448.0, 500.0, -1e-3, 2**-7, 1.5 * 2**-9, 0.3]), torch.randn(57))
    )
    for dtype in (torch.float8_e4m3fn, torch.int8):
        keys, pool = (torch.zeros(2, 1, 32, 64).to(dtype) for _ in range(2))
        scales = [torch.zeros(2, 1, 32) for _ in range(2)]
        qkv = torch.cat((torch.zeros(128), values)).bfloat16().unsqueeze(0)
        rows = paged_rows(torch.zeros(1, 32), torch.ones(1, 1).int(), [5], [1])
        kernels.paged_attention(
            qkv, keys, pool, rows, scale=1.0, key_scales=scales[0], value_scales=scales[1]
        )
        wanted, scale = quantize_pages(values.bfloat16(), dtype)
        assert torch.equal(pool[1, 0, 4].view(torch.uint8), wanted.view(torch.uint8))
        if scale is not None:
            assert float(scales[1][1, 0, 4]) == float(scale)


def test_what_is_no_number_is_never_stored(kernels: Kernels) -> None:
    for dtype in (torch.float8_e4m3fn, torch.int8):
        keys, pool = (torch.zeros(2, 1, 32, 64).to(dtype) for _ in range(2))
        scales = [torch.zeros(2, 1, 32) for _ in range(2)]
        rows = paged_rows(torch.zeros(1, 32), torch.ones(1, 1).int(), [5], [1])
        qkv = torch.full((1, 192), float("nan")).bfloat16()
        kernels.paged_attention(
            qkv, keys, pool, rows, scale=1.0, key_scales=scales[0], value_scales=scales[1]
        )
        assert not pool.view(torch.uint8).any()
        assert not scales[1].any()


def test_large_scores_do_not_overflow(kernels: Kernels) -> None:
    check_attention(kernels, 64, 4, 2, None, [90], page_size=32, scale=6.0)
    check_attention(kernels, 64, 4, 2, None, [90], page_size=32, scale=6.0, lengths=[80])


def paged_rows(
    angles: Tensor, tables: Tensor, contexts: list[int], lengths: list[int]
) -> PagedRows:
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    lone = sum(length == 1 for length in lengths)
    longest = max(contexts[:lone], default=0)
    context_lengths = torch.tensor(contexts).int()
    return PagedRows(angles.cos(), angles.sin(), tables, context_lengths, starts, lone, longest)


def check_attention(
    kernels: Kernels,
    head_size: int,
    heads: int,
    kv_heads: int,
    window: int | None,
    contexts: list[int],
    page_size: int,
    normed: bool = False,
    scale: float = 1.0,
    lengths: list[int] | None = None,
) -> None:
    """Random pages in random order; both write to a copy of the cache of their own."""
    lengths = lengths or [1] * len(contexts)
    tokens = sum(lengths)
    per_row = -(-max(contexts) // page_size)
    num_pages = 1 + per_row * len(contexts)
    pages = (1 + torch.randperm(num_pages - 1)).view(len(contexts), per_row).int()
    angles = torch.rand(tokens, head_size // 2) * 6
    rows = paged_rows(angles, pages, contexts, lengths)
    qkv = draw(tokens, (heads + 2 * kv_heads) * head_size, scale=scale)
    keys, values = (draw(num_pages, kv_heads, page_size, head_size) for _ in range(2))
    norms = (draw(head_size), draw(head_size)) if normed else (None, None)
    arguments = {"scale": head_size**-0.5, "window": window, "eps": EPS}
    arguments |= {"q_norm": norms[0], "k_norm": norms[1]}
    mine = (keys.clone(), values.clone())
    close(
        kernels.paged_attention(qkv, *mine, rows, **arguments),
        reference.paged_attention(qkv, keys, values, rows, **arguments),
    )
    close(mine[0], keys)
    torch.testing.assert_close(mine[1], values)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_the_same_bits_alone_and_among_others(kernels: Kernels, kind: str) -> None:
    """Sampling with a seed then gives the same text alone and in a batch."""
    x, norm = draw(120, 576), draw(576)
    weight = packed(kernels, draw_weight(kind, 97, 576, 1.0))
    whole = kernels.linear(x, norm, weight, None, EPS, torch.float32)
    for count in (1, 2, 5, 8, 9, 15, 100):
        some = kernels.linear(x[3 : 3 + count].clone(), norm, weight, None, EPS, torch.float32)
        assert torch.equal(some, whole[3 : 3 + count])


def test_attention_of_a_row_is_the_same_bits_alone_and_among_others(kernels: Kernels) -> None:
    contexts, page_size = [700, 1, 4000, 9000, 260], 256
    tables = torch.arange(1, 1 + 36 * len(contexts)).view(len(contexts), 36).int()
    angles = torch.rand(len(contexts), 16)
    qkv, keys, values = draw(5, 5 * 32), draw(200, 1, page_size, 32), draw(200, 1, page_size, 32)

    def attend(rows: list[int]) -> Tensor:
        chosen = [contexts[row] for row in rows]
        shared = paged_rows(angles[rows], tables[rows], chosen, [1] * len(rows))
        return kernels.paged_attention(qkv[rows].contiguous(), keys, values, shared, scale=0.2)

    whole = attend([0, 1, 2, 3, 4])
    for row in range(5):
        assert torch.equal(attend([row])[0], whole[row])


@pytest.mark.parametrize("window", [None, 90])
def test_a_prompt_is_the_same_bits_however_it_is_cut(kernels: Kernels, window: int | None) -> None:
    tables, angles = torch.arange(1, 5).view(1, 4).int(), torch.rand(500, 16)
    qkv = draw(500, 8 * 32)

    def attend(cuts: list[int]) -> Tensor:
        keys, values = (torch.zeros(5, 2, 128, 32).bfloat16() for _ in range(2))
        parts, end = [], 0
        for length in cuts:
            own, end = slice(end, end + length), end + length
            rows = paged_rows(angles[own], tables, [end], [length])
            parts.append(
                kernels.paged_attention(
                    qkv[own].contiguous(), keys, values, rows, scale=0.2, window=window
                )
            )
        return torch.cat(parts)

    whole = attend([500])
    for cuts in ([3, 497], [64, 64, 372], [250, 250], [100, 7, 93, 200, 100]):
        assert torch.equal(attend(cuts), whole)


def test_the_status_says_why() -> None:
    usable, why = kernel_status()
    assert why
    assert usable == (load_kernels() is not None)
