"""Each compiled kernel equals its PyTorch specification to bf16 rounding, for any size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.kernels import Kernels, PagedRows, kernel_status, load_kernels, reference

EPS = 1e-5


@pytest.fixture(params=[1, 2])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    loaded = load_kernels(threads=request.param)
    if loaded is None:
        pytest.skip(f"no decode kernels here: {kernel_status()[1]}")
    return loaded


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def draw(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape) * scale).bfloat16()


def close(mine: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(mine.float(), wanted.float(), rtol=2e-2, atol=2e-2)


ROWS = [1, 2, 3, 7, 8, 9, 16, 31, 32]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 96), (72, 33), (576, 960), (100, 7), (33, 1)])
@pytest.mark.parametrize("extras", [True, False])
def test_rms_linear(kernels: Kernels, rows: int, inputs: int, outputs: int, extras: bool) -> None:
    x, weight = draw(rows, inputs), draw(outputs, inputs, scale=inputs**-0.5)
    norm, bias = (draw(inputs), draw(outputs)) if extras else (None, None)
    for dtype in (torch.bfloat16, torch.float32):
        mine = kernels.rms_linear(x, norm, weight, bias, EPS, dtype)
        assert mine.dtype == dtype
        close(mine, reference.rms_linear(x, norm, weight, bias, EPS, dtype))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 96), (172, 64), (1536, 576), (40, 35)])
def test_linear_add(kernels: Kernels, rows: int, inputs: int, outputs: int) -> None:
    a, weight, bias = draw(rows, inputs), draw(outputs, inputs, scale=inputs**-0.5), draw(outputs)
    mine = draw(rows, outputs)
    wanted = mine.clone()
    kernels.linear_add(a, weight, bias, mine)
    reference.linear_add(a, weight, bias, wanted)
    close(mine, wanted)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("inputs", "inner"), [(64, 172), (576, 1536), (48, 33)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_rms_gate_up(kernels: Kernels, rows: int, inputs: int, inner: int, has_bias: bool) -> None:
    x, norm = draw(rows, inputs), draw(inputs)
    weight = draw(2 * inner, inputs, scale=4 * inputs**-0.5)  # gates far from 0, both signs
    bias = draw(2 * inner) if has_bias else None
    mine = kernels.rms_gate_up(x, norm, weight, bias, EPS)
    close(mine, reference.rms_gate_up(x, norm, weight, bias, EPS))


@pytest.mark.parametrize("head_size", [32, 48, 64, 80, 96, 128, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (9, 3), (8, 2), (14, 2), (5, 1)])
@pytest.mark.parametrize("window", [None, 7])
def test_paged_attention(
    kernels: Kernels, head_size: int, heads: int, kv_heads: int, window: int | None
) -> None:
    contexts = [1, 5, 32, 33, 150, 64]
    check_attention(kernels, head_size, heads, kv_heads, window, contexts, page_size=32)


@pytest.mark.parametrize("contexts", [[1], [700], [2000], [129, 1999]])
def test_a_long_context_is_cut_into_parts_and_merged(kernels: Kernels, contexts: list[int]) -> None:
    check_attention(kernels, 64, 3, 1, None, contexts, page_size=256)
    check_attention(kernels, 64, 3, 1, 500, contexts, page_size=256)


def test_queries_and_keys_are_normed_where_the_network_asks(kernels: Kernels) -> None:
    check_attention(kernels, 64, 8, 2, None, [3, 40], page_size=32, normed=True)


def test_large_scores_do_not_overflow(kernels: Kernels) -> None:
    check_attention(kernels, 64, 4, 2, None, [90], page_size=32, scale=6.0)


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
) -> None:
    """Random pages in random order; both write to a copy of the cache of their own."""
    per_row = -(-max(contexts) // page_size)
    num_pages = 1 + per_row * len(contexts)
    pages = (1 + torch.randperm(num_pages - 1)).view(len(contexts), per_row).int()
    angles = torch.rand(len(contexts), head_size // 2) * 6
    rows = PagedRows(
        angles.cos(), angles.sin(), pages, torch.tensor(contexts).int(), longest=max(contexts)
    )
    qkv = draw(len(contexts), (heads + 2 * kv_heads) * head_size, scale=scale)
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


def test_a_row_is_the_same_bits_alone_and_among_others(kernels: Kernels) -> None:
    """Sampling with a seed then gives the same text alone and in a batch."""
    x, weight, norm = draw(32, 576), draw(97, 576), draw(576)
    whole = kernels.rms_linear(x, norm, weight, None, EPS, torch.float32)
    for count in (1, 2, 5, 8, 9, 15):
        some = kernels.rms_linear(x[3 : 3 + count].clone(), norm, weight, None, EPS, torch.float32)
        assert torch.equal(some, whole[3 : 3 + count])


def test_attention_of_a_row_is_the_same_bits_alone_and_among_others(kernels: Kernels) -> None:
    contexts, page_size = [700, 1, 4000, 9000, 260], 256
    tables = torch.arange(1, 1 + 36 * len(contexts)).view(len(contexts), 36).int()
    angles = torch.rand(len(contexts), 16)
    qkv, keys, values = draw(5, 5 * 32), draw(200, 1, page_size, 32), draw(200, 1, page_size, 32)

    def attend(rows: list[int]) -> Tensor:
        chosen = [contexts[row] for row in rows]
        shared = PagedRows(
            angles[rows].cos(),
            angles[rows].sin(),
            tables[rows],
            torch.tensor(chosen).int(),
            max(chosen),
        )
        return kernels.paged_attention(qkv[rows].contiguous(), keys, values, shared, scale=0.2)

    whole = attend([0, 1, 2, 3, 4])
    for row in range(5):
        assert torch.equal(attend([row])[0], whole[row])


def test_the_status_says_why() -> None:
    usable, why = kernel_status()
    assert why
    assert usable == (load_kernels() is not None)
