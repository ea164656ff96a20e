"""A quantized copy holds what its format's definition says, whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from model.checkpoint import CheckpointError, load_model, writing
from model.checkpoint.writing import write_quantized
from model.quantization import quantize
from tests.model.checkpoint.logits import logits_of
from tests.model.checkpoint.writers import llama, write_gguf, write_huggingface

TOKENS = [1, 5, 77, 30, 12, 9, 60, 3]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = write_huggingface(llama().bfloat16(), tmp_path / "source")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "modeling_odd.py").write_text("raise SystemExit")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "modeling_odd.Odd"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


@pytest.mark.parametrize(("scheme", "bits"), [("int8", 8), ("int4", 4)])
def test_files_hold_what_compressed_tensors_defines(
    scheme: str, bits: int, source: Path, tmp_path: Path
) -> None:
    """weight[n, k] = (bits k of weight_packed[n] - 2^(bits-1)) * weight_scale[n, k // group]."""
    write_quantized(source, tmp_path / "out", scheme)
    dense, small = tensors_of(source), tensors_of(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    sizes = {}
    for group in config["quantization_config"]["config_groups"].values():
        for target in group["targets"]:
            sizes[target] = group["weights"]["group_size"]
    for name, weight in dense.items():
        if not name.endswith("_proj.weight"):
            assert torch.equal(small[name], weight)
            continue
        layer = name.removesuffix(".weight")
        words = small[f"{layer}.weight_packed"].long()
        each, mask = 32 // bits, (1 << bits) - 1
        parts = [(words >> (bits * place)) & mask for place in range(each)]
        values = torch.stack(parts, -1).flatten(1) - (1 << (bits - 1))
        group = sizes.get(layer, sizes["Linear"])
        scales = small[f"{layer}.weight_scale"].float().repeat_interleave(group, 1)
        meant = quantize(weight, bits, group).dequantize(torch.float32)
        assert torch.equal(values * scales, meant)
        assert small[f"{layer}.weight_shape"].tolist() == list(weight.shape)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_loading_it_is_quantizing_while_loading(scheme: str, source: Path, tmp_path: Path) -> None:
    write_quantized(source, tmp_path / "out", scheme)
    written = load_model(tmp_path / "out", dtype="float32", quantization=scheme)
    loaded = load_model(source, dtype="float32", quantization=scheme)
    assert written.quantization == loaded.quantization
    assert torch.equal(logits_of(written, TOKENS), logits_of(loaded, TOKENS))


def test_small_files_are_copied_and_code_is_not(source: Path, tmp_path: Path) -> None:
    write_quantized(source, tmp_path / "out", "int8")
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_large_checkpoints_are_written_in_shards(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "_SHARD_BYTES", 20_000)
    write_quantized(source, tmp_path / "out", "int8")
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 2
    one = load_model(source, dtype="float32", quantization="int8")
    other = load_model(tmp_path / "out", dtype="float32", quantization="int8")
    assert torch.equal(logits_of(one, TOKENS), logits_of(other, TOKENS))


def test_progress_ends_at_all_of_the_bytes(source: Path, tmp_path: Path) -> None:
    heard: list[tuple[int, int]] = []
    write_quantized(source, tmp_path / "out", "int8", progress=lambda *pair: heard.append(pair))
    assert heard[-1][0] == heard[-1][1] > 0
    assert heard == sorted(heard)


def test_layers_no_group_divides_stay_dense(tmp_path: Path) -> None:
    source = write_huggingface(llama(intermediate_size=72), tmp_path / "source")
    write_quantized(source, tmp_path / "out", "int4")
    model = load_model(tmp_path / "out", dtype="float32")
    assert "2 of 8 linear layers dense" in model.quantization
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "model.layers.0.mlp.down_proj" in config["quantization_config"]["ignore"]


# --------------------------------------------------------------------------- refusals


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_what_is_there_is_replaced_only_by_force(source: Path, tmp_path: Path) -> None:
    write_quantized(source, tmp_path / "out", "int8")
    with pytest.raises(CheckpointError, match="is there already"):
        write_quantized(source, tmp_path / "out", "int4")
    write_quantized(source, tmp_path / "out", "int4", force=True)
    assert "int4" in load_model(tmp_path / "out").quantization
    assert names(tmp_path) == {"source", "out"}


def test_force_replaces_nothing_but_checkpoints(source: Path, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("x")
    with pytest.raises(CheckpointError, match="no checkpoint folder"):
        write_quantized(source, tmp_path / "home", "int8", force=True)
    assert (tmp_path / "home" / "thesis.tex").read_text() == "x"


@pytest.mark.parametrize("place", [".", "inside", ".."])
def test_targets_in_or_around_the_source_are_refused(place: str, source: Path) -> None:
    with pytest.raises(CheckpointError, match="may not lie in or around"):
        write_quantized(source, source / place, "int8", force=True)


def test_other_layouts_and_quantized_ones_are_refused(source: Path, tmp_path: Path) -> None:
    write_gguf(llama(), tmp_path / "m.gguf")
    with pytest.raises(CheckpointError, match="only Hugging Face folders"):
        write_quantized(tmp_path / "m.gguf", tmp_path / "out", "int8")
    write_quantized(source, tmp_path / "once", "int8")
    with pytest.raises(CheckpointError, match="quantized already"):
        write_quantized(tmp_path / "once", tmp_path / "out", "int4")
    with pytest.raises(CheckpointError, match="int8 or int4, not 'fp8'"):
        write_quantized(source, tmp_path / "out", "fp8")
    with pytest.raises(CheckpointError, match="no such folder"):
        write_quantized(source, tmp_path / "none" / "out", "int8")


def test_a_failure_leaves_nothing_behind(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_quantized(source, tmp_path / "out", "int8")
    before = tensors_of(tmp_path / "out")

    def full(*arguments: Any, **more: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        write_quantized(source, tmp_path / "out", "int4", force=True)
    assert names(tmp_path) == {"source", "out"}
    after = tensors_of(tmp_path / "out")
    assert all(torch.equal(after[name], before[name]) for name in before)
