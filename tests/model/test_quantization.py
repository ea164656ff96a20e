"""Weights as small integers: what is lost, and that nothing else is."""

from __future__ import annotations

import pytest
import torch

from model.quantization import QuantizedWeight, quantize


def test_8_bits_come_back_within_half_a_step_of_their_group() -> None:
    weight = torch.randn(48, 192) * torch.logspace(-3, 1, 48).unsqueeze(1)
    small = quantize(weight, 8)
    steps = small.scales.repeat_interleave(small.group, dim=1)
    assert small.shape == weight.shape
    assert bool(((small.dequantize(torch.float32) - weight).abs() <= steps * 0.5001).all())


def test_4_bits_lose_less_than_the_largest_magnitude_rounded_to_7() -> None:
    weight = torch.randn(48, 192) * torch.logspace(-3, 1, 48).unsqueeze(1)
    grouped = weight.view(48, -1, 32)
    steps = grouped.abs().amax(-1, keepdim=True) / 7
    plain = (grouped / steps).round() * steps
    ours = quantize(weight, 4).dequantize(torch.float32).view_as(grouped)
    lost, lost_plainly = ((w - grouped).square().sum(-1) for w in (ours, plain))
    assert float((lost.sum(-1) / lost_plainly.sum(-1)).mean()) < 0.9


@pytest.mark.parametrize("bits", [8, 4])
def test_whole_numbers_and_zeros_come_back_exactly(bits: int) -> None:
    weight = torch.randint(-7, 8, (8, 128)).float()
    weight[:, ::32] = -127 if bits == 8 else -8
    weight[3] = 0.0
    assert torch.equal(quantize(weight, bits).dequantize(torch.float32), weight)
    assert torch.equal(quantize(-weight, bits).dequantize(torch.float32), -weight)


def test_scales_are_exact_in_bfloat16() -> None:
    for bits in (8, 4):
        scales = quantize(torch.randn(16, 128), bits).scales
        assert torch.equal(scales, scales.bfloat16().float())


def test_four_bits_lie_two_a_byte_the_even_input_first() -> None:
    weight = torch.zeros(1, 32)
    weight[0, :4] = torch.tensor([-8.0, 7.0, 1.0, 2.0])
    assert quantize(weight, 4).values[0, :2].tolist() == [0 | 15 << 4, 9 | 10 << 4]


def test_zeros_and_an_order_of_inputs_are_honoured() -> None:
    weight = QuantizedWeight(
        values=torch.tensor([[0x31, 0x75]], dtype=torch.uint8),  # 1, 3, 5, 7
        scales=torch.tensor([[2.0, 10.0]]),
        zeros=torch.tensor([[1, 6]], dtype=torch.uint8),
        bits=4,
        group=2,
        order=torch.tensor([3, 0, 2, 1]),
    )
    assert weight.dequantize(torch.float32).tolist() == [[4.0, 10.0, -10.0, 0.0]]


def test_inputs_that_are_no_multiple_of_the_group_are_refused() -> None:
    with pytest.raises(ValueError, match="100 inputs"):
        quantize(torch.zeros(4, 100), 8)
