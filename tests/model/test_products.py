"""Products of quantized weights are those of the weights they stand for, in every layout."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model import products
from model.float8 import Float8Weight, PlainProduct, ScaledProduct, quantize_float8
from model.layers import Linear
from model.parallel import ParallelGroup
from model.products import Int4OnCpu, Int8ByOutput, multiply_widened, pack_quantized
from model.quantization import QuantizedWeight, quantize
from model.schemes import AnyWeight, check_scheme, kept_as

CPU = torch.device("cpu")


def weight_of(
    bits: int, group: int, *, zeros: bool = False, order: bool = False
) -> QuantizedWeight:
    """[48, 128], random in every field."""
    generator = torch.Generator().manual_seed(bits * group)
    shape = (48, 128 * bits // 8)
    weight = QuantizedWeight(
        torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator),
        torch.randn(48, 128 // group, generator=generator).bfloat16().float() * 0.01,
        None,
        bits,
        group,
    )
    if order:
        weight = replace(weight, order=torch.randperm(128, generator=generator))
    if zeros:
        drawn = torch.randint(0, 1 << bits, weight.scales.shape, generator=generator)
        weight = replace(weight, zeros=drawn.to(torch.uint8))
    return weight


def plainly(weight: QuantizedWeight) -> Tensor:
    """The definition, weight by weight."""
    dense = torch.empty(weight.shape)
    for n in range(weight.shape[0]):
        for k in range(weight.shape[1]):
            byte = int(weight.values[n, k * weight.bits // 8])
            value = byte if weight.bits == 8 else (byte >> 4 * (k % 2)) & 15
            group = k // weight.group
            zero = 1 << (weight.bits - 1) if weight.zeros is None else int(weight.zeros[n, group])
            place = k if weight.order is None else int(weight.order[k])
            dense[n, place] = (value - zero) * float(weight.scales[n, group])
    return dense


ALL = [
    (bits, group, zeros, order)
    for bits, group in ((8, 64), (8, 128), (4, 32), (4, 16), (4, 128))
    for zeros in (False, True)
    for order in (False, True)
]


@pytest.mark.parametrize(("bits", "group", "zeros", "order"), ALL)
@pytest.mark.parametrize("rows", [1, 5])
def test_products_are_those_of_the_dense_weight(
    bits: int, group: int, zeros: bool, order: bool, rows: int
) -> None:
    weight = weight_of(bits, group, zeros=zeros, order=order)
    dense = plainly(weight)
    assert torch.equal(weight.dequantize(torch.float32), dense)
    x, bias = torch.randn(rows, 128), torch.randn(48)
    wanted = F.linear(x, dense, bias)
    torch.testing.assert_close(multiply_widened(x, weight, bias), wanted, rtol=1e-5, atol=1e-5)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        packed = pack_quantized(weight, dtype)
        if packed is not None:
            found = packed.multiply(x.to(dtype), bias.to(dtype))
            assert found.dtype == dtype
            torch.testing.assert_close(found.float(), wanted, rtol=tolerance, atol=tolerance)


def test_pytorchs_packed_products_are_taken_where_they_pay() -> None:
    assert isinstance(pack_quantized(weight_of(4, 32), torch.bfloat16), Int4OnCpu)
    assert pack_quantized(weight_of(4, 32), torch.float32) is None  # a scalar loop there
    assert pack_quantized(weight_of(4, 16), torch.bfloat16) is None
    assert isinstance(pack_quantized(weight_of(8, 128), torch.bfloat16), Int8ByOutput)
    assert pack_quantized(weight_of(8, 64), torch.bfloat16) is None
    assert pack_quantized(torch.ones(4, 4), torch.bfloat16) is None


# --------------------------------------------------------------------------- layers


def linear(parts: list[int], group: ParallelGroup | None = None, by_rows: bool = False) -> Linear:
    return Linear(
        128, parts, dtype=torch.float32, device=CPU, group=group or ParallelGroup(), by_rows=by_rows
    )


def fill(layer: Linear, weights: list[AnyWeight]) -> None:
    names = [str(number) for number in range(len(weights))]
    slots = layer.slots(names, has_bias=False)
    for name, weight in zip(names, weights, strict=True):
        slots[f"{name}.weight"].fill(weight)


MIXED: list[list[QuantizedWeight]] = [
    [weight_of(4, 32), weight_of(4, 32, zeros=True)],
    [weight_of(4, 32), weight_of(8, 64)],
    [weight_of(8, 128), weight_of(8, 64, zeros=True), weight_of(4, 16)],
    [weight_of(4, 32, order=True), weight_of(4, 32, order=True, zeros=True)],
]


@pytest.mark.parametrize("weights", MIXED)
def test_parts_of_different_layouts_stack_without_loss(weights: list[QuantizedWeight]) -> None:
    layer = linear([48] * len(weights))
    fill(layer, list(weights))
    assert layer.quantized is not None
    x = torch.randn(3, 128)
    wanted = F.linear(x, torch.cat([plainly(weight) for weight in weights]))
    torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "weights",
    [
        [weight_of(4, 32), weight_of(4, 32, order=True)],
        [weight_of(4, 32, order=True), weight_of(8, 64, order=True)],
        [weight_of(4, 32), torch.randn(48, 128)],
        [torch.randn(48, 128), weight_of(4, 32)],
        [weight_of(4, 32), quantize_float8(torch.randn(48, 128))],
    ],
)
def test_parts_that_fit_no_one_layout_are_widened(weights: list[AnyWeight]) -> None:
    layer = linear([48, 48])
    fill(layer, weights)
    assert layer.quantized is None
    assert layer.quantized_as == ""
    dense = [w if isinstance(w, Tensor) else w.dequantize(torch.float32) for w in weights]
    assert torch.equal(layer.weight, torch.cat(dense))


@pytest.mark.parametrize("by_rows", [False, True])
@pytest.mark.parametrize(
    "weight", [weight_of(4, 32), weight_of(8, 128, zeros=True), weight_of(4, 32, order=True)]
)
def test_ranks_hold_slices_that_respect_groups(weight: QuantizedWeight, by_rows: bool) -> None:
    size, dense = 2, plainly(weight)
    for rank in range(size):
        layer = linear([48], ParallelGroup(rank, size), by_rows)
        fill(layer, [weight])
        held = (
            layer.weight if layer.quantized is None else layer.quantized.dequantize(torch.float32)
        )
        assert torch.equal(held, dense.chunk(size, int(by_rows))[rank])
        is_sorted_and_cut = by_rows and weight.order is not None
        assert (layer.quantized is None) == is_sorted_and_cut


def test_a_rank_quantizes_its_own_slice() -> None:
    weight = torch.randn(48, 128)
    layer = linear([48], ParallelGroup(1, 2), by_rows=True)
    layer.scheme = "int4"
    fill(layer, [weight])
    assert layer.quantized is not None
    wanted = quantize(weight[:, 64:], 4).dequantize(torch.float32)
    assert torch.equal(layer.quantized.dequantize(torch.float32), wanted)


def test_inputs_no_group_divides_stay_dense_and_smaller_groups_are_tried() -> None:
    groups = {k: kept_as(torch.randn(4, k), "int8", torch.float32, CPU) for k in (192, 96, 80, 72)}
    found = {k: w.group if isinstance(w, QuantizedWeight) else None for k, w in groups.items()}
    assert found == {192: 64, 96: 32, 80: 16, 72: None}


@pytest.mark.parametrize(("scheme", "is_small"), [("auto", False), ("int8", True)])
def test_what_has_no_fast_product_is_widened_unless_asked_for(scheme: str, is_small: bool) -> None:
    """In bfloat16 a weight widened for each product costs five dense products of one row."""
    layer = Linear(128, [48], dtype=torch.bfloat16, device=CPU, group=ParallelGroup())
    layer.scheme = scheme
    weight = weight_of(8, 64)
    fill(layer, [weight])
    layer.pack(lambda held: pack_quantized(held, torch.bfloat16))
    layer.widen_if_slow()
    assert bool(layer.quantized_as) == is_small
    x = torch.randn(3, 128).bfloat16()
    wanted = F.linear(x.float(), plainly(weight))
    torch.testing.assert_close(layer(x).float(), wanted, rtol=0.05, atol=0.05)


def test_bytes_are_counted_as_held() -> None:
    layer = linear([48])
    fill(layer, [weight_of(4, 32)])
    assert layer.num_bytes == 48 * 64 + 48 * 4 * 4
    layer.pack(lambda weight: pack_quantized(weight, torch.float32))
    assert layer.num_bytes == 48 * 64 + 48 * 4 * 4


# --------------------------------------------------------------------------- fp8


def test_fp8_is_refused_on_processors() -> None:
    with pytest.raises(ValueError, match="use int8 or int4 on a CPU"):
        check_scheme("fp8", CPU)
    with pytest.raises(ValueError, match="'int5' is not known"):
        check_scheme("int5", CPU)


def test_fp8_weights_are_widened_on_processors() -> None:
    weight = quantize_float8(torch.randn(16, 128))
    kept = kept_as(weight, "auto", torch.bfloat16, CPU)
    assert isinstance(kept, Tensor)
    torch.testing.assert_close(kept, weight.dequantize(torch.bfloat16))


@pytest.mark.parametrize("product", [ScaledProduct, PlainProduct])
def test_fp8_products_come_near_the_dense_one(product: type) -> None:
    """torch._scaled_mm has a CPU path, slow and right."""
    torch.manual_seed(0)
    weight, x = torch.randn(32, 64), torch.randn(16, 64) * torch.logspace(-3, 3, 16)[:, None]
    packed = product(quantize_float8(weight), torch.bfloat16)
    try:
        found = packed.multiply(x.bfloat16(), None).float()
    except RuntimeError as error:
        pytest.skip(f"torch._scaled_mm does not run here: {error}")
    wanted = F.linear(x, weight)
    error = (found - wanted).norm(dim=1) / wanted.norm(dim=1)
    assert float(error.max()) < 0.06


@pytest.mark.parametrize("start", [0, 8, 16])
@pytest.mark.parametrize("axis", [0, 1])
def test_slices_of_blocks_mean_the_same(start: int, axis: int) -> None:
    values = torch.randn(40, 56).to(torch.float8_e4m3fn)
    weight = Float8Weight(values, torch.rand(3, 4), (16, 16))
    whole = weight.dequantize(torch.float32)
    part = weight.outputs(start, 24) if axis == 0 else weight.inputs(start, 24)
    assert torch.equal(part.dequantize(torch.float32), whole.narrow(axis, start, 24))


def test_a_product_that_computes_wrongly_or_not_at_all_is_not_believed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    weight = weight_of(8, 64)

    class Wrong:
        def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
            return torch.zeros(x.shape[0], 48)

    class Right:
        def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
            return multiply_widened(x, weight, bias)

    def broken() -> Wrong:
        raise RuntimeError("no kernel image is available")

    right = Right()
    assert products._believed(Wrong, weight, torch.float32) is None
    assert products._believed(broken, weight, torch.float32) is None
    assert products._believed(lambda: right, weight, torch.float32) is right
    assert "computes wrongly" in caplog.text
    assert "no kernel image is available" in caplog.text
