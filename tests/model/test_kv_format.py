"""What a cache in few bits keeps of keys and values, and how far answers move by it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor

from model.bundled import bundled_model_path
from model.checkpoint import load_model
from model.kv_format import (
    FP8_LARGEST,
    KV_CACHE_DTYPES,
    UnknownCacheFormat,
    cache_format,
    dequantize,
    format_name,
    layer_pages,
    quantize,
    widen,
)
from model.tokenizer import load_tokenizer
from tests.model.sequences import Fed

FP8, INT8 = KV_CACHE_DTYPES["fp8"], KV_CACHE_DTYPES["int8"]
ALL_CODES = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(FP8)

finite = st.floats(-(2.0**100), 2.0**100, width=32)
tensors = arrays.arrays(np.float32, (3, 2, 8), elements=finite).map(torch.from_numpy)
anything = arrays.arrays(np.float32, (3, 2, 8), elements=st.floats(width=32)).map(torch.from_numpy)


def round_trip(x: Tensor, dtype: torch.dtype) -> Tensor:
    return dequantize(*quantize(x, dtype), torch.float32)


@given(tensors)
def test_fp8_is_within_a_sixteenth_and_cut_at_its_largest(x: Tensor) -> None:
    """Half a unit in the last of three binary places; below 2**-6 the steps are 2**-9 wide."""
    kept = x.clamp(-FP8_LARGEST, FP8_LARGEST)
    assert ((round_trip(x, FP8) - kept).abs() <= (kept.abs() / 16).clamp(min=2.0**-10)).all()


@given(tensors)
def test_int8_is_within_half_a_scale_of_the_largest_entry(x: Tensor) -> None:
    largest = x.abs().amax(-1, keepdim=True)
    allowed = largest / 254 * (1 + 1e-5) + 1e-42  # below that float32 itself has few places
    assert ((round_trip(x, INT8) - x).abs() <= allowed).all()


@given(anything)
@pytest.mark.parametrize("dtype", [FP8, INT8])
def test_whatever_is_written_reads_as_numbers_and_zeros_stay_zeros(
    dtype: torch.dtype, x: Tensor
) -> None:
    x[0] = 0
    stored, scales = quantize(x, dtype)
    read = dequantize(stored, scales, torch.float32)
    assert read.isfinite().all()
    assert not read[0].any()
    assert not read[x.isnan()].any()
    assert scales is None or not scales[0].any()


@given(tensors, tensors)
@pytest.mark.parametrize("dtype", [FP8, INT8])
def test_a_token_is_stored_the_same_whatever_lies_beside_it(
    dtype: torch.dtype, x: Tensor, other: Tensor
) -> None:
    together = round_trip(torch.cat((x, other)), dtype)
    assert torch.equal(together[: len(x)], round_trip(x, dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_every_code_of_fp8_is_widened_to_its_number(dtype: torch.dtype) -> None:
    expected = ALL_CODES.float()
    is_number = ~expected.isnan()
    assert is_number.sum() == 254
    assert torch.equal(widen(ALL_CODES, dtype)[is_number].float(), expected[is_number])


def test_pages_are_read_whole_or_head_by_head() -> None:
    x = torch.randn(2, 5, 3, 4, 8)  # keys and values, pages, heads, tokens
    stored, scales = quantize(x, INT8)
    keys, values = layer_pages(*stored.unbind(), scales, torch.float32)
    expected = dequantize(stored, scales, torch.float32)
    some = torch.tensor([4, 1])
    assert torch.equal(keys.read(some), expected[0, some])
    assert torch.equal(values.heads(slice(1, 3)).read(slice(2, 4)), expected[1, 2:4, 1:3])
    numbers, own_scales = values.unscaled(some)
    assert own_scales is not None
    assert torch.equal(numbers * own_scales.unsqueeze(-1), expected[1, some])


def test_formats_have_names_and_auto_is_the_models() -> None:
    for name, dtype in KV_CACHE_DTYPES.items():
        assert cache_format(name, torch.bfloat16) == dtype
        assert format_name(dtype) == name
    assert cache_format("auto", torch.float16) == torch.float16
    with pytest.raises(UnknownCacheFormat, match="fp8"):
        cache_format("int4", torch.bfloat16)


# --------------------------------------------------------------------------- a whole model

TEXT = (
    "Once upon a time there was a little fox who lived at the edge of the wood. Every morning she "
    "went down to the river to drink, and every morning the old heron was there before her. "
    '"Good morning," said the fox. "It is a fine day for fishing." The heron looked at the '
    "water and said nothing. One day the river was frozen, and the heron could not fish. The fox "
    "had a warm house and some bread. She thought about it for a long while. Then she went out and "
    'called across the ice, "Come in and eat with me, for it is cold." And so they became friends.'
)
# How much the mean log-probability of a token of TEXT may move, in nats.
ALLOWED = {"bfloat16": 0.01, "float16": 0.002, "fp8": 0.03, "int8": 0.01}


def mean_logprob(kv_cache_dtype: str, dtype: str = "float32") -> float:
    path = bundled_model_path()
    model = load_model(path, dtype=dtype, cache_dtype=kv_cache_dtype)
    tokens = load_tokenizer(path).encode(TEXT)
    logits = Fed(model, 32).logits(tokens, [40, 1, 1, 1, 64])  # chunks and decodes
    known = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(tokens[1:]).unsqueeze(1))
    return known.mean().item()


@pytest.fixture(scope="module")
def exact() -> float:
    return mean_logprob("auto")


@pytest.mark.parametrize("name", ALLOWED)
def test_the_bundled_model_reads_a_text_as_before(name: str, exact: float) -> None:
    found = mean_logprob(name)
    print(name, found - exact)
    assert math.isfinite(found)
    assert found != exact, "the cache's format has no effect"
    assert abs(found - exact) < ALLOWED[name]
