"""How FlashInfer is called, held against a faithful fake of it: results, plans, fixed buffers."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from model import attention_cuda, attention_flashinfer
from model.attention import UnknownBackend, choose_backend
from model.attention_flashinfer import FlashInfer, Problem, _Planned
from model.batch import BatchBuilder, BatchRow
from model.cuda_graphs import Bucket, DecodeGraphs
from model.kv_cache import KVCache
from model.kv_format import dequantize, quantize
from tests.model import fake_flashinfer
from tests.model.graph_tape import Tape, graphable_llama
from tests.model.paged_reference import PagedCase, random_case, reference
from tests.model.random_llama import random_llama

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
DECODES = [(1, 5), (1, 16), (1, 17), (1, 1), (1, 90)]
CHUNKS = [(3, 3), (7, 40), (33, 33), (16, 48)]
FP8 = torch.float8_e4m3fn


pytestmark = pytest.mark.usefixtures("flashinfer")


def attend(case: PagedCase, window: int | None = None, kept: FlashInfer | None = None) -> Tensor:
    kept = kept or FlashInfer(CPU)
    return kept.attend(case.q, case.k_pages, case.v_pages, case.batch, case.scale, window)


def check(case: PagedCase, window: int | None = None) -> None:
    out = attend(case, window)
    assert out.dtype == case.q.dtype
    torch.testing.assert_close(out.float(), reference(case, window), atol=1e-2, rtol=1e-2)


def half(rows: list[tuple[int, int]], **shape: Any) -> PagedCase:
    return random_case(rows, **shape).to("cpu", torch.bfloat16)


# --------------------------------------------------------------------------- results


@pytest.mark.parametrize("rows", [DECODES, CHUNKS, DECODES + CHUNKS, [(1, 1)], [(2, 2)]])
@pytest.mark.parametrize("window", [None, 1, 4, 16, 33])
def test_decodes_chunks_and_mixtures_equal_plain_attention(
    rows: list[tuple[int, int]], window: int | None
) -> None:
    check(half(rows), window)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (9, 3), (10, 2), (8, 1)])
@pytest.mark.parametrize("head_size", attention_flashinfer.HEAD_SIZES)
def test_any_grouping_of_heads(heads: int, kv_heads: int, head_size: int) -> None:
    rows = [(1, 20), (5, 21)]
    check(half(rows, heads=heads, kv_heads=kv_heads, head_size=head_size, shared_pages=1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp8_pages_are_read_as_what_they_hold(dtype: torch.dtype) -> None:
    case = random_case(DECODES + CHUNKS).to("cpu", dtype)
    stored, scales = quantize(torch.stack((case.k_pages, case.v_pages)), FP8)
    assert scales is None, "their scale is 1, so none is handed over"
    case.k_pages, case.v_pages = stored.unbind()
    out = attend(case)
    case.k_pages, case.v_pages = dequantize(stored, None, torch.float32)
    torch.testing.assert_close(out.float(), reference(case), atol=1e-2, rtol=1e-2)


def test_scores_are_scaled_as_the_network_says() -> None:
    case = half(DECODES + CHUNKS)
    wanted = reference(case)
    case.q = case.q * 2  # exact, and so is half the scale
    kept = FlashInfer(CPU)
    out = kept.attend(case.q, case.k_pages, case.v_pages, case.batch, case.scale / 2, None)
    torch.testing.assert_close(out.float(), wanted, atol=1e-2, rtol=1e-2)


def test_queries_may_be_a_view_of_a_fused_projection() -> None:
    case = half(DECODES + CHUNKS)
    fused = torch.randn(case.q.size(0), case.q.size(1) + 4, case.q.size(2)).bfloat16()
    fused[:, : case.q.size(1)] = case.q
    case.q = fused[:, : case.q.size(1)]
    check(case)


# --------------------------------------------------------------------------- plans


def plans_of(flashinfer: ModuleType) -> list[Any]:
    return [wrapper for event, wrapper in flashinfer.log if event == "plan"]


def test_a_step_is_planned_once_and_run_in_every_layer(flashinfer: ModuleType) -> None:
    kept, case = FlashInfer(CPU), half(DECODES + CHUNKS)
    layers = [attend(case, kept=kept) for _ in range(5)]
    assert all(torch.equal(layer, layers[0]) for layer in layers)
    assert len(plans_of(flashinfer)) == 2  # decodes and chunks
    attend(half(DECODES), kept=kept)
    assert len(plans_of(flashinfer)) == 3
    made = [event for event, _ in flashinfer.log if event != "plan"]
    assert sorted(made) == ["Decode", "Prefill"], "wrappers are kept from step to step"


def test_a_step_that_comes_again_is_planned_again() -> None:
    """Another one has used the wrappers meanwhile."""
    kept, first = FlashInfer(CPU), half(DECODES + CHUNKS)
    before = attend(first, kept=kept)
    attend(half([(1, 3), (9, 20)], seed=1), kept=kept)
    assert torch.equal(attend(first, kept=kept), before)


def test_layers_of_two_windows_have_a_plan_each(flashinfer: ModuleType) -> None:
    kept, case = FlashInfer(CPU), half(DECODES)
    for window in (None, 4, None, 4):
        out = attend(case, window, kept)
        torch.testing.assert_close(out.float(), reference(case, window), atol=1e-2, rtol=1e-2)
    assert [wrapper.window_left for wrapper in plans_of(flashinfer)] == [-1, 3]


def test_a_plan_waits_until_the_last_one_has_left_the_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both are written to the same pinned memory, and the device may be a step behind."""
    heard: list[str] = []

    class Event:
        def record(self) -> None:
            heard.append("record")

        def synchronize(self) -> None:
            heard.append("wait")

    class Wrapper:
        def plan(self, *args: Any, **settings: Any) -> None:
            heard.append("plan")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
    case = half(DECODES)
    problem = Problem.of(case.q, case.k_pages, case.scale, None)
    planned = _Planned(problem, Wrapper(), CUDA)
    pages = attention_flashinfer._Pages(case.batch.tables, case.batch.contexts, problem)
    planned.plan(object(), pages)
    planned.plan(object(), pages)
    assert heard == ["plan", "record", "wait", "plan", "record"]


# --------------------------------------------------------------------------- graphs


def test_plans_for_a_graph_keep_their_buffers_and_pad_with_page_zero(
    flashinfer: ModuleType,
) -> None:
    kept = FlashInfer(CPU)
    indices = torch.zeros(64, dtype=torch.int32)
    plans = kept.decode_plans(8, indices)
    addresses = set()
    for rows in (DECODES, DECODES[:2], [(1, 30)] * 8):
        case = half(rows)
        case.k_pages[0] = case.v_pages[0] = 0  # no row's, but padding reads it
        padding = torch.zeros(8 - len(rows), *case.q.shape[1:], dtype=case.q.dtype)
        q = torch.cat((case.q, padding))
        plans.plan(case.batch.tables, case.batch.contexts)
        problem = Problem.of(q, case.k_pages, case.scale, None)
        out = plans.attend(q, case.k_pages, case.v_pages, problem)
        torch.testing.assert_close(out[: len(rows)].float(), reference(case), atol=1e-2, rtol=1e-2)
        (wrapper,) = {wrapper for event, wrapper in flashinfer.log if event == "Decode"}
        padded = wrapper.starts[len(rows) : -1].long()
        assert not wrapper.indices[padded].any(), "nobody is given page 0"
        assert wrapper.last[len(rows) :].tolist() == [1] * (8 - len(rows))
        addresses.add((wrapper.starts.data_ptr(), wrapper.indices.data_ptr()))
    assert len(addresses) == 1
    assert wrapper.indices.data_ptr() == indices.data_ptr()


@torch.inference_mode()
@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, FP8])
def test_a_network_gives_the_logits_it_gives_by_the_reference(
    flashinfer: ModuleType, cache_dtype: torch.dtype
) -> None:
    plain = random_llama("cpu", "reference", torch.bfloat16, pack=False, head_dim=64)
    model = graphable_llama()
    logits = []
    for each in (plain, model):
        cache = KVCache(each.config, 20, 16, cache_dtype, "cpu")
        builder = BatchBuilder(64, 8, 4, 16)
        prompts = [BatchRow([7, 8, 9, *[11] * 20], 0, [3, 9], 1), BatchRow([4, 5], 0, [5, 1], 1)]
        logits.append(each.forward(builder.build(prompts), cache))
        mixed = [BatchRow([6], 23, [3, 9], 1), BatchRow([8] * 15, 2, [5, 1], 1)]
        logits.append(each.forward(builder.build(mixed), cache))
    for wanted, found in zip(logits[:2], logits[2:], strict=True):
        torch.testing.assert_close(found, wanted, atol=0.05, rtol=0.02)
    assert len(plans_of(flashinfer)) == 3, "chunks; then decodes and chunks: not a plan a layer"
    assert cache.kept
    cache.close()
    assert not cache.kept, "the workspace goes with the cache"


@torch.inference_mode()
@pytest.mark.parametrize("changes", [{}, {"architectures": ["MistralForCausalLM"]}])
def test_a_replayed_graph_reads_the_pages_of_its_step(
    tapes: list[Tape], flashinfer: ModuleType, changes: dict[str, Any]
) -> None:
    if changes:
        changes = changes | {"sliding_window": 9}
    model = graphable_llama(**changes)
    cache = KVCache(model.config, 20, 16, torch.bfloat16, "cpu")
    builder = BatchBuilder(64, 8, 4, 16)
    tables = [[3, 9], [5, 1], [2, 7]]
    prompts = [BatchRow([7, 8, 9, *[11] * 20], 0, tables[0]), BatchRow([4, 5], 0, tables[1])]
    model.forward(builder.build(prompts), cache)
    graphs = DecodeGraphs(model, cache, 4, 4)
    graphs.capture()
    assert len(tapes) == len(graphs.buckets) == 3
    assert sum(wrapper.buffers is not None for wrapper in plans_of(flashinfer)) == 3
    for rows in (
        [BatchRow([6], 23, tables[0], 1), BatchRow([3], 2, tables[1], 1)],
        [BatchRow([9], 3, tables[1], 1)],
        [BatchRow([1], 24, tables[0], 1), BatchRow([1], 4, tables[1], 1), BatchRow([2], 0, [2], 1)],
    ):
        found = graphs.forward(builder.build(rows))
        torch.testing.assert_close(
            found, model.forward(builder.build(rows), cache), atol=0.02, rtol=0.02
        )
    assert sum(tape.replays for tape in tapes) == 3
    assert graphs.bucket_of(builder.build(rows)) == Bucket(4, False)


# --------------------------------------------------------------------------- choosing


@pytest.mark.parametrize(
    ("dtype", "head_size", "pages", "why"),
    [
        (torch.float32, 64, torch.float32, "bfloat16, not float32"),
        (torch.bfloat16, 80, torch.bfloat16, "not of 80"),
        (torch.bfloat16, 64, torch.int8, "no int8 pages"),
        (torch.bfloat16, 64, torch.float16, "no float16 pages in a bfloat16 model"),
    ],
)
def test_what_it_cannot_serve_is_refused_with_the_reason(
    dtype: torch.dtype, head_size: int, pages: torch.dtype, why: str, monkeypatch: Any
) -> None:
    assert why in str(attention_flashinfer.refusal(dtype, head_size, pages))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    attention_cuda.flashinfer_refusal.cache_clear()
    with pytest.raises(UnknownBackend, match=why):
        choose_backend("flashinfer", CUDA, dtype, head_size, pages)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_size", attention_flashinfer.HEAD_SIZES)
def test_what_it_can_serve_is_not_refused(dtype: torch.dtype, head_size: int) -> None:
    for pages in (dtype, FP8):
        assert attention_flashinfer.refusal(dtype, head_size, pages) is None


def test_it_is_refused_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    attention_cuda.flashinfer_refusal.cache_clear()
    assert "no CUDA device" in str(attention_cuda.flashinfer_refusal())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    attention_cuda.flashinfer_refusal.cache_clear()
    with pytest.raises(UnknownBackend, match="pip install flashinfer-python"):
        choose_backend("flashinfer", CUDA)
    attention_cuda.flashinfer_refusal.cache_clear()


@pytest.mark.parametrize(
    ("triton", "refusal", "chosen"),
    [(True, None, "triton"), (False, None, "flashinfer"), (False, "not there", "sdpa")],
)
def test_auto_takes_what_is_right_on_the_device_triton_first(
    triton: bool, refusal: str | None, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_cuda, "triton_available", lambda pages: triton)
    monkeypatch.setattr(attention_cuda, "flashinfer_refusal", lambda *shape: refusal)
    assert choose_backend("auto", CUDA) == chosen


# --------------------------------------------------------------------------- the fake itself


@pytest.mark.skipif(
    importlib.util.find_spec("flashinfer") is None, reason="FlashInfer is not installed"
)
@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("decode.py", "BatchDecodeWithPagedKVCacheWrapper"),
        ("prefill.py", "BatchPrefillWithPagedKVCacheWrapper"),
    ],
)
@pytest.mark.parametrize("method", ["__init__", "plan", "run"])
def test_the_fake_has_the_signatures_of_the_package(
    file: str, name: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read, not imported: that needs the package's own dependencies. Newer ones may add names."""
    monkeypatch.delitem(sys.modules, "flashinfer")
    spec = importlib.util.find_spec("flashinfer")
    assert spec is not None
    assert spec.origin is not None
    real = signature(Path(spec.origin).with_name(file), name, method)
    own = list(inspect.signature(getattr(getattr(fake_flashinfer, name), method)).parameters)
    assert set(own) <= set(real)
    in_order = [each for each in real if each in own]
    assert in_order[:9] == own[:9], "those that are given by place"


def signature(path: Path, name: str, method: str) -> list[str]:
    """The last definition's parameters; those before it are overloads. ``plan`` of the decode
    wrapper hands its keywords on to ``_plan_impl``."""
    (body,) = (
        node.body
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef) and node.name == name
    )
    methods = {node.name: node.args for node in body if isinstance(node, ast.FunctionDef)}
    args = methods["_plan_impl" if method == "plan" and "_plan_impl" in methods else method]
    found = [each.arg for each in (*args.posonlyargs, *args.args)]
    found += [args.vararg.arg] if args.vararg else []
    return found + [each.arg for each in args.kwonlyargs]
