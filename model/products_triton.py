"""A few rows times integers in groups, as a Triton kernel: what CUDA has no operation for.

Imported only where Triton is (``model.products`` asks). Values are whole numbers below 256, exact
in bfloat16 and float16: a group's products are summed, its scales multiplied in afterwards.
A row's sums run in one order, whatever it is batched with.
"""

# M rows, N outputs, K inputs

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from model.quantization import QuantizedWeight

# Fusion is said aloud, because Triton is about to change the default and warns until it has.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
_ROWS, _OUTPUTS, _INPUTS = 16, 32, 64  # of a tile; inputs at most, and within one group


def takes(weight: QuantizedWeight) -> bool:
    return weight.group % 16 == 0


def multiply(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """[M, K] -> [M, N] in x's dtype; inputs as ``weight.values`` has them."""
    rows, (outputs, inputs) = x.shape[0], weight.shape
    x = x.contiguous()
    out = x.new_empty(rows, outputs)
    tile = next(size for size in (_INPUTS, 32, 16) if weight.group % size == 0)
    grid = (triton.cdiv(outputs, _OUTPUTS), triton.cdiv(rows, _ROWS))
    _product[grid](
        *(x, weight.values, weight.scales, weight.scales if weight.zeros is None else weight.zeros),
        *(out, rows, outputs, inputs, weight.group),
        BITS=weight.bits,
        HAS_ZEROS=weight.zeros is not None,
        ROWS=_ROWS,
        OUTPUTS=_OUTPUTS,
        INPUTS=tile,
        **OPTIONS,
    )
    return out


@triton.jit  # type: ignore[untyped-decorator]
def _product(  # type: ignore[no-untyped-def]
    x,
    values,
    scales,
    zeros,
    out,
    rows,
    outputs,
    inputs,
    group,
    BITS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    m = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, INPUTS)
    is_row, is_output = m < rows, n < outputs
    width = inputs * BITS // 8
    weight = values + n[None, :].to(tl.int64) * width
    total = tl.zeros((ROWS, OUTPUTS), dtype=tl.float32)
    for start in range(0, inputs, INPUTS):
        part = tl.load(
            x + m[:, None] * inputs + start + k[None, :], mask=is_row[:, None], other=0.0
        )
        place = start + k[:, None]
        if BITS == 4:
            byte = tl.load(weight + place // 2, mask=is_output[None, :], other=0)
            whole = ((byte >> (4 * (place % 2)).to(tl.uint8)) & 15).to(tl.float32)
        else:
            whole = tl.load(weight + place, mask=is_output[None, :], other=0).to(tl.float32)
        at = n * (inputs // group) + start // group
        if HAS_ZEROS:
            whole -= tl.load(zeros + at, mask=is_output, other=0).to(tl.float32)[None, :]
        else:
            whole -= 2 ** (BITS - 1)
        scale = tl.load(scales + at, mask=is_output, other=0.0)
        total += tl.dot(part, whole.to(part.dtype), input_precision="ieee") * scale[None, :]
    kept = is_row[:, None] & is_output[None, :]
    tl.store(out + m[:, None] * outputs + n[None, :], total.to(out.dtype.element_ty), mask=kept)
