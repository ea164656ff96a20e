"""Adapters on a GPU, token by token: every token finds its own slot, the host knows of none.

Two launches a layer: ``down`` to the few numbers between, ``up`` into the output. Grids and
addresses depend on shapes alone, so they never wait for the device and a CUDA graph may hold them.
A token's sums run in one order, whoever stands beside it. Long runs (prompt chunks) are PyTorch's
matrix products, in ``model.adapters``.
"""

# T tokens, K inputs, N outputs, P parts, R the largest rank, S slots

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.adapters import AdapterRows, AdapterSlots

SMALL = 16  # rows of ``down`` one program computes
WIDE = 256  # inputs it reads at a time
OUTPUTS = 128  # columns of the output one program adds to
# Said aloud, because Triton is about to change the default and warns until it has.
_OPTIONS = {"enable_fp_fusion": True}


def add_by_token(x: Tensor, out: Tensor, rows: AdapterRows, held: AdapterSlots) -> None:
    """out [T, N] += what each token's slot makes of x [T, K]; a slot of -1 adds nothing."""
    assert rows.slots is not None, "each token's slot stands on the device"
    token_slots, down, up, slots = rows.slots, held.down, held.up, held.held_on_device
    (tokens, inputs), wide = x.shape, down.size(1)
    outputs, borders, parts = up.size(2), held.borders, len(held.parts)
    hidden = torch.empty(tokens, wide, dtype=torch.float32, device=x.device)
    _shrink[(tokens, triton.cdiv(wide, SMALL))](
        x,
        down,
        hidden,
        token_slots,
        slots,
        inputs,
        wide,
        x.stride(0),
        PARTS=parts,
        SMALL=SMALL,
        WIDE=WIDE,
        **_OPTIONS,
    )
    inner = [*borders[1:-1], outputs, outputs][:2]  # where the second and the third part begin
    _expand[(tokens, triton.cdiv(outputs, OUTPUTS))](
        hidden,
        up,
        out,
        token_slots,
        slots,
        outputs,
        wide,
        up.size(1),
        inner[0],
        inner[1],
        out.stride(0),
        PARTS=parts,
        OUTPUTS=OUTPUTS,
        **_OPTIONS,
    )


@triton.jit  # type: ignore[untyped-decorator]
def _slot_of_token(  # type: ignore[no-untyped-def]
    token_slots,
    slots,  # [S, 1 + P] int32: the rank of what a slot holds, and whether it has each part
    PARTS: tl.constexpr,
):
    """Of this program's token: its number, its slot, what is known of that, and its rank or 0."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(token_slots + token).to(tl.int64)
    facts = slots + slot * (1 + PARTS)
    return token, slot, facts, tl.load(facts, slot >= 0, 0)


@triton.jit  # type: ignore[untyped-decorator]
def _shrink(  # type: ignore[no-untyped-def]
    x,
    down,
    hidden,
    token_slots,
    slots,
    inputs,
    wide,
    x_stride,
    PARTS: tl.constexpr,
    SMALL: tl.constexpr,
    WIDE: tl.constexpr,
):
    token, slot, facts, rank = _slot_of_token(token_slots, slots, PARTS)
    if tl.program_id(1) * SMALL < PARTS * rank:
        rows = tl.program_id(1) * SMALL + tl.arange(0, SMALL)
        is_row = rows < PARTS * rank
        part = tl.where(is_row, rows, 0) // rank
        is_row &= tl.load(facts + 1 + part) > 0
        sums = tl.zeros((SMALL,), tl.float32)
        start = down + slot * wide * inputs
        for k in range(0, inputs, WIDE):
            columns = k + tl.arange(0, WIDE)
            is_input = columns < inputs
            own = tl.load(x + token * x_stride + columns, is_input, 0.0)
            weights = tl.load(
                start + rows[:, None].to(tl.int64) * inputs + columns[None, :],
                is_row[:, None] & is_input[None, :],
                0.0,
            )
            sums += tl.sum(weights.to(tl.float32) * own.to(tl.float32)[None, :], 1)
        tl.store(hidden + token * wide + rows, sums, is_row)


@triton.jit  # type: ignore[untyped-decorator]
def _expand(  # type: ignore[no-untyped-def]
    hidden,
    up,
    out,
    token_slots,
    slots,
    outputs,
    wide,
    max_rank,
    second,
    third,
    out_stride,
    PARTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    token, slot, facts, rank = _slot_of_token(token_slots, slots, PARTS)
    if rank > 0:
        columns = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
        part = (columns >= second).to(tl.int32) + (columns >= third).to(tl.int32)
        is_output = columns < outputs
        is_held = tl.load(facts + 1 + part, is_output, 0) > 0
        place = out + token * out_stride + columns
        sums = tl.load(place, is_output, 0.0).to(tl.float32)
        between = hidden + token * wide + part * rank
        weights = up + slot * max_rank * outputs + columns
        for i in range(rank):
            factor = tl.load(between + i, is_held, 0.0)
            sums += factor * tl.load(weights, is_held, 0.0).to(tl.float32)
            weights += outputs
        tl.store(place, sums.to(out.dtype.element_ty), is_output)
