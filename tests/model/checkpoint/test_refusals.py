"""What cannot be served is refused with one line that names the file or tensor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from model.checkpoint import CheckpointError, inspect, load_config, load_model
from tests.model.checkpoint.writers import llama, write_gguf, write_huggingface, write_meta


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_huggingface(llama(), tmp_path / "model")


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def reconfigure(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


# --------------------------------------------------------------------------- folders


def test_missing_path_is_named():
    with pytest.raises(CheckpointError, match="no/such/model: no such file or folder"):
        inspect("no/such/model")


def test_empty_folder_says_what_was_expected(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"holds no weights: expected \*\.safetensors"):
        inspect(tmp_path)


def test_pickled_bin_files_are_refused_with_what_to_do(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="convert them to safetensors"):
        inspect(tmp_path)


def test_adapter_is_refused_in_favour_of_its_base_model(tmp_path: Path):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="holds an adapter"):
        inspect(tmp_path)


def test_one_file_of_a_folder_is_refused_in_favour_of_the_folder(folder: Path):
    with pytest.raises(CheckpointError, match="give its folder instead"):
        inspect(folder / "model.safetensors")


def test_missing_config_is_named(folder: Path):
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_config(folder)


def test_missing_shard_is_named(tmp_path: Path):
    write_huggingface(llama(), tmp_path, shards=True)
    sorted(tmp_path.glob("*.safetensors"))[1].unlink()
    with pytest.raises(CheckpointError, match=r"1 of \d+ shards are missing: model-00002-of"):
        inspect(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"shards are here and .*index\.json is missing"):
        inspect(tmp_path)


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "..", "a/b.safetensors", "c:\\x.safetensors"]
)
def test_index_naming_files_outside_the_folder_is_refused(name: str, folder: Path):
    index = {"weight_map": {"model.norm.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder.parent / "outside.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="which is no safetensors file here"):
        inspect(folder)


def test_missing_meta_shard_is_named(tmp_path: Path):
    write_meta(llama(), tmp_path, ranks=2)
    (tmp_path / "consolidated.00.pth").unlink()
    with pytest.raises(CheckpointError, match=r"consolidated\.00\.pth is missing"):
        inspect(tmp_path)


def test_last_meta_shard_missing_shows_in_the_shapes(tmp_path: Path):
    write_meta(llama(), tmp_path, ranks=2)
    (tmp_path / "consolidated.01.pth").unlink()
    with pytest.raises(CheckpointError, match="misshapen"):
        load_model(tmp_path)


def test_missing_gguf_part_is_named(tmp_path: Path):
    (tmp_path / "m-00001-of-00003.gguf").write_bytes(b"")
    (tmp_path / "m-00003-of-00003.gguf").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"1 of 3 parts are missing: m-00002-of-00003\.gguf"):
        inspect(tmp_path)


def test_folder_of_several_gguf_models_asks_for_one(tmp_path: Path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"name one of a\.gguf, b\.gguf"):
        inspect(tmp_path)


# --------------------------------------------------------------------------- tensors


def test_missing_surplus_and_misshapen_tensors_are_named(folder: Path):
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.extra.weight"] = torch.ones(3)
        tensors["model.norm.weight"] = torch.ones(7)

    rewrite(folder, change)
    with pytest.raises(CheckpointError) as caught:
        load_model(folder)
    message = str(caught.value)
    assert "1 tensors are missing (model.layers.1.mlp.up_proj.weight)" in message
    assert "1 have no place in the network (model.extra.weight)" in message
    assert "model.norm.weight is [7], expected [64]" in message
    assert "\n" not in message


def test_many_wrong_tensors_are_counted_and_a_few_named(folder: Path):
    rewrite(folder, lambda tensors: [tensors.pop(n) for n in list(tensors) if ".layers.1." in n])
    with pytest.raises(CheckpointError, match="the config says 2 layers, the files hold 1"):
        load_model(folder)
    reconfigure(folder, num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=8)
    with pytest.raises(CheckpointError, match=r"are misshapen \(.*and \d+ more\)|are misshapen"):
        load_model(folder)


def test_untied_checkpoint_without_a_head_is_refused(folder: Path):
    rewrite(folder, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(CheckpointError, match=r"missing \(lm_head\.weight\)"):
        load_model(folder)


def test_tensor_in_two_files_is_refused(tmp_path: Path):
    write_huggingface(llama(), tmp_path, shards=True)
    shard = sorted(tmp_path.glob("*.safetensors"))[0]
    other = sorted(tmp_path.glob("*.safetensors"))[1]
    save_file(load_file(other) | load_file(shard), other)
    with pytest.raises(CheckpointError, match="stored more than once"):
        load_model(tmp_path)


def test_float8_weights_are_refused_by_name(folder: Path):
    name = "model.layers.0.mlp.up_proj.weight"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)

    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=f"{name} in model.safetensors is stored as F8_E4M3"):
        load_model(folder)


@pytest.mark.parametrize("prefix", ["language_model.", "model.language_model."])
def test_multimodal_checkpoints_are_refused(prefix: str, folder: Path):
    rewrite(folder, lambda tensors: tensors.update({prefix + "x": torch.ones(1)}))
    with pytest.raises(CheckpointError, match="vision and multimodal checkpoints"):
        load_model(folder)


# --------------------------------------------------------------------------- configs


def test_quantization_config_is_refused_naming_the_method(folder: Path):
    reconfigure(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(CheckpointError, match="with 'bitsandbytes', which is not supported"):
        load_config(folder)


def test_unknown_architecture_is_refused_by_name(folder: Path):
    reconfigure(folder, architectures=["MixtralForCausalLM"], model_type="mixtral")
    with pytest.raises(ValueError, match="MixtralForCausalLM"):
        load_config(folder)


@pytest.mark.parametrize("key", ["moe_args", "vision_args", "quantization_args", "lora_args"])
def test_meta_params_of_other_networks_are_refused(key: str, tmp_path: Path):
    write_meta(llama(), tmp_path, params={key: {"some": 1}})
    with pytest.raises(CheckpointError, match=rf"params\.json describes .* \({key}\)"):
        load_config(tmp_path)


def test_gguf_with_experts_is_refused(tmp_path: Path):
    writer = gguf.GGUFWriter(tmp_path / "moe.gguf", "llama")
    writer.add_expert_count(8)
    _finish(writer)
    with pytest.raises(CheckpointError, match="'llama' with experts, which is not supported"):
        load_config(tmp_path / "moe.gguf")


def test_gguf_of_another_architecture_lists_the_known_ones(tmp_path: Path):
    _finish(gguf.GGUFWriter(tmp_path / "other.gguf", "gemma3"))
    with pytest.raises(CheckpointError, match=r"'gemma3', .*: llama, qwen2, qwen3"):
        load_config(tmp_path / "other.gguf")


def test_gguf_type_that_cannot_be_unpacked_is_named(tmp_path: Path):
    write_gguf(llama(num_hidden_layers=1), tmp_path / "model.gguf")
    header = (tmp_path / "model.gguf").read_bytes()
    name = b"blk.0.ffn_up.weight"
    place = header.index(name) + len(name) + 4 + 2 * 8  # dimensions, two extents
    (tmp_path / "model.gguf").write_bytes(
        header[:place]
        + int(gguf.GGMLQuantizationType.I32).to_bytes(4, "little")
        + header[place + 4 :]
    )
    with pytest.raises(CheckpointError, match=r"ffn_up\.weight is stored as I32"):
        load_model(tmp_path / "model.gguf")


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.add_tensor("token_embd.weight", np.zeros((8, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
