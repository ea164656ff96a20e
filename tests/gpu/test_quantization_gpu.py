"""Quantized weights on a GPU say what they say on a processor."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from model.layers import Linear
from model.parallel import ParallelGroup
from model.products import pack_quantized
from model.schemes import dense

pytestmark = pytest.mark.gpu

LARGEST_ERROR = {"int8": 0.01, "int4": 0.01, "fp8": 0.05}  # of the product by the same weights


@pytest.mark.parametrize("rows", [1, 7, 64])
@pytest.mark.parametrize("scheme", ["int8", "int4", "fp8"])
def test_products_are_those_of_the_weights_they_stand_for(scheme: str, rows: int) -> None:
    torch.manual_seed(0)
    device = torch.device("cuda")
    layer = Linear(256, [128, 64], dtype=torch.bfloat16, device=device, group=ParallelGroup())
    layer.scheme = scheme
    slots = layer.slots(["a", "b"], has_bias=False)
    for name in ("a", "b"):
        slots[f"{name}.weight"].fill(torch.randn(slots[f"{name}.weight"].shape))
    assert layer.quantized is not None
    meant = dense(layer.quantized)
    x = torch.randn(rows, 256, device=device, dtype=torch.bfloat16)
    layer.pack(lambda weight: pack_quantized(weight, torch.bfloat16))
    wanted = F.linear(x.float(), meant)
    error = (layer(x).float() - wanted).norm() / wanted.norm()
    assert float(error) < LARGEST_ERROR[scheme]


@pytest.mark.parametrize("scheme", ["int8", "int4", "fp8"])
def test_a_row_is_the_same_alone_and_in_a_batch(scheme: str) -> None:
    torch.manual_seed(0)
    device = torch.device("cuda")
    layer = Linear(256, [128], dtype=torch.bfloat16, device=device, group=ParallelGroup())
    layer.scheme = scheme
    layer.slots(["a"], has_bias=False)["a.weight"].fill(torch.randn(128, 256))
    layer.pack(lambda weight: pack_quantized(weight, torch.bfloat16))
    x = torch.randn(8, 256, device=device, dtype=torch.bfloat16)
    torch.testing.assert_close(layer(x)[:1], layer(x[:1]), rtol=0.01, atol=0.05)
