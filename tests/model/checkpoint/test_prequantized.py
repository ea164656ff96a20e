"""Quantized Hugging Face folders mean what their formats' definitions say, or are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.checkpoint import CheckpointError, load_config, load_model
from model.quantization import quantize
from tests.model.checkpoint.logits import difference
from tests.model.checkpoint.quantized_writers import (
    Stored,
    awq,
    compressed,
    fp8,
    gptq,
    integers,
    packed,
    write_quantized,
)
from tests.model.checkpoint.writers import llama

TOKENS = [1, 5, 77, 30, 12, 9, 60, 3]
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
FP8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 48]}

Case = tuple[dict[str, Any], Callable[[Tensor], Stored], str]
CASES: dict[str, Case] = {
    "awq": (AWQ, awq, "int4 weights, groups of 32"),
    "gptq": (GPTQ, gptq, "int4 weights, groups of 32"),
    "gptq-symmetric": (GPTQ, partial(gptq, symmetric=True), "int4 weights, groups of 32"),
    "gptq-act-order": (GPTQ, partial(gptq, act_order=True), "int4 weights, groups of 32"),
    "gptq-v2": (
        GPTQ | {"checkpoint_format": "gptq_v2"},
        partial(gptq, less=0),
        "int4 weights, groups of 32",
    ),
    "gptq-8-bits": (
        GPTQ | {"bits": 8, "group_size": 16},
        partial(gptq, bits=8, group=16, act_order=True),
        "int8 weights, groups of 16",
    ),
    "packed": (compressed("pack-quantized", INT4), packed, "int4 weights, groups of 32"),
    "packed-zeros": (
        compressed("pack-quantized", INT4 | {"symmetric": False}),
        partial(packed, symmetric=False),
        "int4 weights, groups of 32",
    ),
    "packed-8-bits": (
        compressed("pack-quantized", INT8),
        partial(packed, bits=8, group=None),
        "int8 weights, a scale an output",
    ),
    "integers": (compressed("int-quantized", INT8), integers, "int8 weights, a scale an output"),
    "integers-zeros": (
        compressed("int-quantized", INT8 | {"symmetric": False}),
        partial(integers, symmetric=False),
        "int8 weights, a scale an output",
    ),
    "floats": (compressed("float-quantized", FP8), fp8, "none"),
    "floats-tensor": (
        compressed("naive-quantized", FP8 | {"strategy": "tensor"}),
        partial(fp8, kind="tensor"),
        "none",
    ),
    "fp8-blocks": (BLOCKS, partial(fp8, kind="blocks", name="weight_scale_inv"), "none"),
    "fbgemm": ({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, fp8, "none"),
}


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_the_weights_the_format_defines(name: str, tmp_path: Path) -> None:
    config, store, words = CASES[name]
    reference = write_quantized(llama(), tmp_path, config, store)
    model = load_model(tmp_path, dtype="float32")
    assert model.quantization.split(";")[0] == words
    assert difference(model, reference, TOKENS) < 2e-5
    assert model.num_parameters == reference.num_parameters()


@pytest.mark.parametrize("name", ["awq", "gptq-act-order", "packed-zeros", "fp8-blocks"])
def test_widened_on_request_they_mean_the_same(name: str, tmp_path: Path) -> None:
    config, store, _ = CASES[name]
    reference = write_quantized(llama(), tmp_path, config, store)
    model = load_model(tmp_path, dtype="float32", quantization="none")
    assert model.quantization == "none"
    assert difference(model, reference, TOKENS) < 2e-5


@pytest.mark.parametrize("name", ["awq", "gptq", "packed"])
def test_integers_that_are_small_enough_are_not_rounded_again(name: str, tmp_path: Path) -> None:
    config, store, words = CASES[name]
    reference = write_quantized(llama(tie_word_embeddings=True), tmp_path, config, store)
    model = load_model(tmp_path, dtype="float32", quantization="int8")
    assert model.quantization == f"{words}; head: int8 weights, a scale an output"
    head = quantize(reference.lm_head.weight.data, 8).dequantize(torch.float32)
    reference.lm_head.weight = torch.nn.Parameter(head)
    assert difference(model, reference, TOKENS) < 2e-5


def test_8_bits_become_4_on_request(tmp_path: Path) -> None:
    config, store, _ = CASES["packed-8-bits"]
    write_quantized(llama(), tmp_path, config, store)
    model = load_model(tmp_path, dtype="float32", quantization="int4")
    assert model.quantization.startswith("int4 weights, groups of 32")


def test_layers_with_several_schemes_are_each_read_by_their_own(tmp_path: Path) -> None:
    config = compressed("pack-quantized", INT4)
    eight = {"targets": ["re:.*down_proj"], "weights": INT8}
    config["config_groups"]["group_1"] = eight
    shapes = iter(range(1000))

    def store(weight: Tensor) -> Stored:
        is_down = weight.shape == (64, 96)
        next(shapes)
        return packed(weight, bits=8, group=None) if is_down else packed(weight)

    reference = write_quantized(llama(), tmp_path, config, store)
    model = load_model(tmp_path, dtype="float32")
    assert difference(model, reference, TOKENS) < 2e-5
    assert "2 x int8 weights, a scale an output" in model.quantization


def test_queries_quantized_beside_dense_keys_are_widened(tmp_path: Path) -> None:
    def store(weight: Tensor) -> Stored:
        return packed(weight) if weight.shape == (64, 64) else ({"weight": weight}, weight)

    config = compressed("pack-quantized", INT4)
    reference = write_quantized(llama(), tmp_path, config, store)
    model = load_model(tmp_path, dtype="float32")
    assert difference(model, reference, TOKENS) < 2e-5
    assert "6 of 8 linear layers dense" in model.quantization


def test_idle_biases_of_gptq_are_passed_over_and_others_refused(tmp_path: Path) -> None:
    write_quantized(llama(), tmp_path, GPTQ, gptq)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.self_attn.o_proj.bias"] = torch.zeros(64)
    save_file(tensors, file)
    load_model(tmp_path)
    tensors["model.layers.0.self_attn.o_proj.bias"] = torch.ones(64)
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match="no place in the network"):
        load_model(tmp_path)


# --------------------------------------------------------------------------- lies and damage

LAYER = "model.layers.0.mlp.up_proj"


def _drop(part: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.pop(f"{LAYER}.{part}")


def _set(part: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], Any]:
    def apply(tensors: dict[str, Tensor]) -> None:
        tensors[f"{LAYER}.{part}"] = change(tensors[f"{LAYER}.{part}"]).contiguous()

    return apply


Damage = tuple[str, Callable[[dict[str, Tensor]], Any], str]
DAMAGE: dict[str, Damage] = {
    "awq-no-scales": ("awq", _drop("scales"), f"{LAYER} has no scales"),
    "awq-no-zeros": ("awq", _drop("qzeros"), f"{LAYER} has no qzeros"),
    "awq-no-weight": ("awq", _drop("qweight"), f"{LAYER} has no qweight"),
    "awq-scales-cut": ("awq", _set("scales", lambda t: t[:1]), "scales is"),
    "awq-flat": ("awq", _set("qweight", lambda t: t.flatten()), "expected a matrix"),
    "awq-empty": ("awq", _set("qweight", lambda t: t[:, :0]), "expected a matrix"),
    "awq-narrow": ("awq", _set("qweight", lambda t: t[:, :1]), "scales is"),
    "awq-floats": ("awq", _set("qweight", lambda t: t.float()), "is stored as F32, expected I32"),
    "gptq-index-high": ("gptq", _set("g_idx", lambda t: t + 1), "names groups that are not"),
    "gptq-index-low": ("gptq", _set("g_idx", lambda t: t - 2), "names groups that are not"),
    "gptq-index-uneven": ("gptq", _set("g_idx", lambda t: t * 0), "unequal numbers"),
    "gptq-index-short": ("gptq", _set("g_idx", lambda t: t[:3]), "g_idx is"),
    "gptq-zero-of-256": ("gptq-8-bits", _set("qzeros", lambda t: t * 0 - 1), "a zero of 256"),
    "packed-no-scale": ("packed", _drop("weight_scale"), "has no weight_scale"),
    "packed-no-zeros": ("packed-zeros", _drop("weight_zero_point"), "has no weight_zero_point"),
    "packed-scale-wide": ("packed", _set("weight_scale", lambda t: t.repeat(1, 9)), "scale is"),
    "packed-tall": ("packed", _set("weight_packed", lambda t: t.repeat(2, 1)), "scale is"),
    "integers-scale": ("integers", _set("weight_scale", lambda t: t[:3]), "weight_scale is"),
    "fp8-no-scale": ("floats", _drop("weight_scale"), "stored as F8_E4M3 and has no scales"),
    "fp8-scale": ("floats", _set("weight_scale", lambda t: t[:3]), "weight_scale is"),
    "fp8-blocks": ("fp8-blocks", _set("weight_scale_inv", lambda t: t[:, :1]), "scale_inv is"),
    "fp8-integers": ("floats", _set("weight", lambda t: t.view(torch.int8)), "expected F8_E4M3"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_tensors_are_refused_in_one_line(name: str, tmp_path: Path) -> None:
    case, damage, message = DAMAGE[name]
    config, store, _ = CASES[case]
    write_quantized(llama(), tmp_path, config, store)
    tensors = load_file(tmp_path / "model.safetensors")
    damage(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_model(tmp_path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        ("gptq", {"bits": 3}, "3 bits are not supported"),
        ("gptq", {"bits": "4"}, "bits is '4'"),
        ("gptq", {"bits": True}, "bits is True"),
        ("gptq", {"group_size": 1 << 40}, "group_size is"),
        ("gptq", {"group_size": 1 << 30}, "no multiple of its groups"),
        ("gptq", {"group_size": 0}, "group_size is 0"),
        ("gptq", {"group_size": 80}, "no multiple of its groups of 80"),
        ("gptq", {"checkpoint_format": "marlin"}, "'marlin' is not supported"),
        ("gptq", {"quant_method": "hqq"}, "'hqq'"),
        ("gptq", {"quant_method": ["gptq"]}, "not supported"),
        ("awq", {"version": "gemv"}, "'gemv' packing"),
        ("awq", {"bits": 8}, "8 bits are not supported"),
        ("packed", {"config_groups": {}}, "no config_groups"),
        ("packed", {"config_groups": [1]}, "no config_groups"),
        ("packed", {"config_groups": {"a": 1}}, "says nothing of weights"),
        ("packed", {"format": "nvfp4-pack-quantized"}, "'nvfp4-pack-quantized'"),
        ("packed", {"format": ["x"]}, "are not supported"),
        ("packed", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse weights"),
        ("fp8-blocks", {"weight_block_size": [0, 1]}, "blocks of fp8 weights"),
        ("fp8-blocks", {"weight_block_size": [1 << 31, 1 << 31]}, "scale_inv is"),
        ("fp8-blocks", {"weight_block_size": "128"}, "blocks of fp8 weights"),
    ],
)
def test_lying_configs_are_refused_in_one_line(
    case: str, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config, store, _ = CASES[case]
    write_quantized(llama(), tmp_path, config | change, store)
    with pytest.raises(CheckpointError) as caught:
        load_model(tmp_path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("targets", [["re:("], [1], "Linear", None])
def test_targets_that_are_none_are_refused(targets: Any, tmp_path: Path) -> None:
    config = compressed("pack-quantized", INT4)
    config["config_groups"]["group_0"]["targets"] = targets
    write_quantized(llama(), tmp_path, config, packed)
    with pytest.raises(CheckpointError, match="target"):
        load_model(tmp_path)


@pytest.fixture(scope="module")
def gptq_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gptq")
    write_quantized(llama(num_hidden_layers=1), folder, GPTQ, gptq)
    return folder


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    values=st.recursive(
        st.none() | st.booleans() | st.integers(-9, 1 << 40) | st.text(max_size=6),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
        max_leaves=5,
    ),
    key=st.sampled_from(["bits", "group_size", "quant_method", "checkpoint_format", ""]),
    method=st.sampled_from(["gptq", "awq", "fp8", "compressed-tensors"]),
)
def test_any_quantization_config_is_read_or_refused(
    values: Any, key: str, method: str, gptq_folder: Path, tmp_path: Path
) -> None:
    for file in gptq_folder.iterdir():
        if not (tmp_path / file.name).exists():
            (tmp_path / file.name).symlink_to(file)
    document = json.loads((gptq_folder / "config.json").read_text())
    stated = GPTQ | {"quant_method": method, "config_groups": values}
    document["quantization_config"] = stated | {key: values} if key else values
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(document))
    try:
        load_config(tmp_path)
        load_model(tmp_path, dtype="float32")
    except ValueError as error:
        assert str(error)  # noqa: PT017 whether it is refused depends on what was drawn
