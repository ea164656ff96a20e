"""How PyTorch's paged ``varlen_attn`` is called: bound to its real signature, computed plainly."""

from __future__ import annotations

import importlib.util
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import attention
from torch.nn.attention import varlen

from model import attention_cuda
from tests.model.fake_flashinfer import kernel
from tests.model.paged_reference import random_case, reference

REAL = inspect.signature(varlen.varlen_attn)
DECODES = [(1, 5), (1, 256), (1, 257), (1, 1)]
CHUNKS = [(3, 3), (7, 300), (33, 33)]

pytestmark = pytest.mark.skipif(
    "block_table" not in REAL.parameters, reason="varlen_attn has no pages before PyTorch 2.12"
)


class Flash:
    """``varlen_attn``, and what of it was asked for."""

    __signature__ = REAL

    def __init__(self) -> None:
        self.impl: str | None = None
        self.calls: list[dict[str, Any]] = []

    def __call__(self, *args: Any, **settings: Any) -> Tensor:
        given = REAL.bind(*args, **settings).arguments
        self.calls.append(given)
        q, table, contexts = given["query"], given["block_table"], given["seqused_k"]
        keys, values = given["key"].transpose(1, 2), given["value"].transpose(1, 2)
        page = keys.size(2)
        assert table.dtype == contexts.dtype == given["cu_seq_q"].dtype == torch.int32
        # FlashAttention 2 wants pages of 256 and a tensor of starts, 3 refuses that tensor.
        assert (given["cu_seq_k"] is None) == (self.impl == "FA3")
        assert self.impl == "FA3" or page % 256 == 0
        assert given["num_splits"] == 1
        assert given["max_k"] >= int(contexts.max())
        assert given["max_q"] >= int(given["cu_seq_q"].diff().max())
        assert given.get("enable_gqa", False) == (q.size(1) != keys.size(1))
        left, right = given["window_size"]
        assert right == 0
        pages = [
            row[: -(-int(context) // page)] for row, context in zip(table, contexts, strict=True)
        ]
        starts = torch.tensor([0, *map(len, pages)]).cumsum(0).int()
        out = torch.empty_like(q)
        last = (contexts - 1) % page + 1
        limits = (given["scale"], left, True)
        rows = (given["cu_seq_q"], starts, torch.cat(pages), last)
        kernel(q, keys, values, *rows, *limits, out)
        return out


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> Flash:
    fake = Flash()
    monkeypatch.setattr(varlen, "varlen_attn", fake)
    monkeypatch.setattr(attention, "current_flash_attention_impl", lambda: fake.impl)
    return fake


@pytest.mark.parametrize("impl", [None, "FA3"])
@pytest.mark.parametrize("rows", [DECODES, CHUNKS, DECODES + CHUNKS])
@pytest.mark.parametrize("window", [None, 1, 64])
def test_its_arguments_say_what_plain_attention_computes(
    flash: Flash, impl: str | None, rows: list[tuple[int, int]], window: int | None
) -> None:
    flash.impl = impl
    case = random_case(rows, page=256, unread=0.0).to("cpu", torch.bfloat16)
    args = (case.q, case.k_pages, case.v_pages, case.batch, case.scale, window)
    out = attention_cuda.varlen_attention(*args)
    torch.testing.assert_close(out.float(), reference(case, window), atol=1e-2, rtol=1e-2)
    assert len(flash.calls) == 1


@pytest.mark.parametrize(("impl", "calls"), [(None, 0), ("FA3", 1)])
def test_pages_that_flash_attention_2_cannot_read_go_elsewhere(
    flash: Flash, impl: str | None, calls: int
) -> None:
    flash.impl = impl
    case = random_case(DECODES + CHUNKS, page=16, unread=0.0).to("cpu", torch.bfloat16)
    args = (case.q, case.k_pages, case.v_pages, case.batch, case.scale, None)
    out = attention_cuda.varlen_attention(*args)
    torch.testing.assert_close(out.float(), reference(case), atol=1e-2, rtol=1e-2)
    assert len(flash.calls) == calls


@pytest.mark.parametrize(
    ("installed", "capability", "right", "used"),
    [
        (True, (9, 0), {"FA3", None}, "FA3"),
        (True, (9, 0), {None}, None),
        (True, (8, 0), {"FA3", None}, None),
        (True, (10, 0), {"FA3", None}, None),
        (False, (9, 0), {"FA3", None}, None),
        (True, (9, 0), set(), "nothing"),
        (True, (7, 5), {"FA3", None}, "nothing"),
    ],
)
def test_flash_attention_3_is_used_where_it_is_there_and_right(
    flash: Flash,
    installed: bool,
    capability: tuple[int, int],
    right: set[str | None],
    used: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def switch(impl: str | None = None) -> None:
        flash.impl = impl

    monkeypatch.setattr(attention, "activate_flash_attention_impl", switch)
    monkeypatch.setattr(attention, "restore_flash_attention_impl", switch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if installed else None)
    monkeypatch.setattr(attention_cuda, "_is_right", lambda *call: flash.impl in right)
    available = attention_cuda.varlen_available.__wrapped__()
    assert (flash.impl if available else "nothing") == used


def test_a_package_built_for_another_torch_is_passed_over(
    flash: Flash, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(impl: str) -> None:
        raise RuntimeError("undefined symbol")

    monkeypatch.setattr(attention, "activate_flash_attention_impl", fail)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert not attention_cuda._activate_fa3()
    assert "undefined symbol" in caplog.text
