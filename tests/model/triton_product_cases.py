"""Run by test_products_triton.py under Triton's interpreter, not collected by itself."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from model import products_triton
from tests.model.test_products import plainly, weight_of


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(("bits", "group"), [(8, 64), (8, 128), (8, 16), (4, 32), (4, 16)])
@pytest.mark.parametrize("rows", [1, 3, 17])
def test_products_are_those_of_the_dense_weight(
    bits: int, group: int, zeros: bool, rows: int
) -> None:
    weight = weight_of(bits, group, zeros=zeros)
    x = torch.randn(rows, 128)
    found = products_triton.multiply(x, weight)
    torch.testing.assert_close(found, F.linear(x, plainly(weight)), rtol=1e-4, atol=1e-4)
    alone = products_triton.multiply(x[-1:], weight)
    assert torch.equal(found[-1:], alone)
