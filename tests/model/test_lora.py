"""PEFT folders: read as PEFT reads them, and what lies or asks for more than LoRA is refused."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from model.checkpoint.errors import CheckpointError
from model.lora import Adapter, AdapterError, AdapterNotFound, read_adapter
from model.lora_config import LoraConfig
from tests.model.networks import network
from tests.model.peft_folders import ALL, PREFIX, random_adapter, tensors_of, write_folder
from tests.model.sequences import ours

REFERENCE = network("llama")
SHAPES = {name: one.shape for name, one in ours(REFERENCE).projections().items()}
Q0 = "model.layers.0.self_attn.q_proj"


def read(folder: Path, max_rank: int = 8, dtype: torch.dtype = torch.float32) -> Adapter:
    return read_adapter(folder, SHAPES, max_rank, dtype)


def good(**changes: Tensor | None) -> dict[str, Tensor]:
    """The tensors of an adapter of q_proj; ``A`` and ``B`` replace those of its first layer."""
    tensors = tensors_of(random_adapter(REFERENCE, ["q_proj"]))
    for side, tensor in changes.items():
        name = f"{PREFIX}{Q0}.lora_{side}.weight"
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    return tensors


def refused(folder: Path, words: str, **arguments: Any) -> None:
    with pytest.raises(AdapterError, match=words) as caught:
        read(folder, **arguments)
    assert "\n" not in str(caught.value)
    assert str(folder) not in str(caught.value)
    assert len(str(caught.value)) < 600


QUERIES: dict[str, Any] = {"target_modules": ["q_proj"]}


# --------------------------------------------------------------------------- read


def test_the_scale_lies_in_up_and_both_have_the_network_s_dtype(tmp_path: Path) -> None:
    adapter = random_adapter(REFERENCE, ["q_proj"])
    found = read(write_folder(tmp_path, tensors_of(adapter), **QUERIES))
    assert set(found.weights) == set(adapter)
    down, up = adapter[Q0]
    torch.testing.assert_close(found.weights[Q0].down, down)
    torch.testing.assert_close(found.weights[Q0].up, 2.0 * up.t())
    half = read(tmp_path, dtype=torch.bfloat16)
    assert half.weights[Q0].up.dtype == half.weights[Q0].down.dtype == torch.bfloat16
    assert half.num_bytes * 2 == found.num_bytes


@pytest.mark.parametrize(
    ("config", "modules"),
    [
        ({"target_modules": ["q_proj", "mlp.up_proj"]}, 4),
        ({"target_modules": "all-linear"}, 14),
        ({"target_modules": [Q0]}, 1),
        ({"target_modules": ["q_proj", "not_here"], "layers_to_transform": [1]}, 1),
        ({"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"}, 1),
        ({"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["v_proj"]}, 2),
        ({"target_modules": []}, 0),
    ],
)
def test_the_config_names_modules_as_peft_does(config: dict[str, Any], modules: int) -> None:
    found = LoraConfig.from_peft({"peft_type": "LORA", **config}).names(SHAPES)
    assert found is not None
    assert len(found) == modules


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": r".*(q|v)_proj"},
        {"target_modules": "(a+)+$" + "a" * 60},
        {"target_modules": ["q_proj"], "exclude_modules": "(.*)*x"},
        {},
    ],
)
def test_an_expression_is_not_run_the_tensors_say_what_they_adapt(
    config: dict[str, Any], tmp_path: Path
) -> None:
    assert LoraConfig.from_peft({"peft_type": "LORA", **config}).names(SHAPES) is None
    folder = write_folder(tmp_path, good(), **({"target_modules": None} | config))
    assert len(read(folder).weights) == 2


def test_the_first_pattern_that_fits_counts(tmp_path: Path) -> None:
    patterns = {r"model.layers.\d+.self_attn.q_proj": 16, "q_proj": 4, r"^model\.layers\.0\.x": 1}
    config = LoraConfig.from_peft({"peft_type": "LORA", "alpha_pattern": patterns, "r": 8})
    assert config.scale_of(Q0) == 2.0
    assert config.scale_of("model.layers.0.mlp.up_proj") == 1.0


# --------------------------------------------------------------------------- not LoRA, or not it


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"peft_type": None}, "peft_type is None"),
        ({"use_dora": True}, "DoRA"),
        ({"bias": "lora_only"}, "biases"),
        ({"lora_bias": True}, "biases beside lora_B"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"use_qalora": True}, "QALoRA"),
        ({"use_something_new": True}, "use_something_new"),
        ({"kasa_config": {"x": 1}}, "kasa_config"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"alora_invocation_tokens": [1]}, "activated LoRA"),
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights"),
        ({"r": 0}, "r is 0"),
        ({"r": True}, "r is True"),
        ({"r": 4.0}, "r is 4.0"),
        ({"r": 10**30}, "rank 1000"),
        ({"lora_alpha": "8"}, "lora_alpha is '8'"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"lora_alpha": float("inf")}, "lora_alpha is inf"),
        ({"target_modules": [1]}, "target_modules"),
        ({"target_modules": {"q_proj": 1}}, "target_modules"),
        ({"layers_to_transform": ["0"]}, "layers_to_transform"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern"),
        ({"rank_pattern": {"q_proj": -1}}, "rank_pattern"),
        ({"alpha_pattern": {"(a+)+": 1}}, "more than module names"),
        ({"alpha_pattern": {".*.*.*x": 1}}, "more than module names"),
        ({"alpha_pattern": {f".*{i}": 1 for i in range(50)}}, "more than module names"),
        ({"alpha_pattern": {str(i): 1 for i in range(5000)}}, "at most 4096"),
        ({"r": 8}, "expected \\[8, 64\\]"),
        ({"rank_pattern": {"layers.1.self_attn.q_proj": 5}}, "expected \\[5, 64\\]"),
        ({"target_modules": ["q_proj", "v_proj"]}, "without tensors"),
        ({"target_modules": ["v_proj"]}, "without tensors"),
        ({"target_modules": [Q0]}, "not named by target_modules"),
        ({"target_modules": ["\x1b[31m" * 1000] * 2}, "not named by target_modules"),
    ],
)
def test_what_is_not_plain_lora_is_refused_by_name(
    config: dict[str, Any], words: str, tmp_path: Path
) -> None:
    refused(write_folder(tmp_path, good(), **(QUERIES | config)), words)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (good(A=None), "lora_A or lora_B is missing"),
        (good(B=None), "lora_A or lora_B is missing"),
        (good(A=torch.zeros(4, 63)), "lora_A of .* is \\[4, 63\\], expected \\[4, 64\\]"),
        (good(B=torch.zeros(65, 4)), "lora_B of .* is \\[65, 4\\], expected \\[64, 4\\]"),
        (good(A=torch.zeros(5, 64), B=torch.zeros(64, 5)), "expected \\[4, 64\\]"),
        (good(A=torch.zeros(4 * 64)), "expected \\[4, 64\\]"),
        (good(A=torch.zeros(4, 64, dtype=torch.int8)), "stored as I8"),
        (good(A=torch.full((4, 64), float("nan"))), "not finite"),
        (good(B=torch.full((64, 4), float("inf"))), "not finite"),
        ({}, "holds no tensor"),
        (good() | {"evil": torch.zeros(1)}, "evil is unknown"),
        (good() | {f"{PREFIX}lm_head.lora_A.weight": torch.zeros(4, 64)}, "missing: lm_head"),
        (
            good() | {f"{PREFIX}model.embed_tokens.lora_embedding_A": torch.zeros(4, 96)},
            "adapts an embedding",
        ),
        (
            good() | {f"{PREFIX}{Q0}.lora_magnitude_vector": torch.zeros(64)},
            "belongs to DoRA",
        ),
        (good() | {f"{PREFIX}{Q0}.lora_B.bias": torch.zeros(64)}, "is a bias"),
        (good() | {f"{PREFIX}{Q0}.lora_A.default.weight": torch.zeros(4, 64)}, "adapted twice"),
        (
            {
                f"{PREFIX}model.layers.{layer}.self_attn.q_proj.lora_{side}.weight": torch.zeros(*s)
                for layer in (0, 7)
                for side, s in (("A", (4, 64)), ("B", (64, 4)))
            },
            "no linear layers of this network \\(model.layers.7",
        ),
    ],
)
def test_tensors_that_lie_are_refused_by_name(
    tensors: dict[str, Tensor], words: str, tmp_path: Path
) -> None:
    refused(write_folder(tmp_path, tensors, **QUERIES), words)


def test_a_rank_above_the_server_s_is_refused_before_it_is_read(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, good(), **QUERIES)
    refused(folder, "rank 4, this server takes at most 3: raise --max-lora-rank", max_rank=3)


def test_what_overflows_the_network_s_dtype_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, good(B=torch.full((64, 4), 60_000.0)), **QUERIES)
    assert read(folder).weights
    refused(folder, "not finite in torch.float16", dtype=torch.float16)


# --------------------------------------------------------------------------- files


def test_a_folder_without_an_adapter_is_told_apart(tmp_path: Path) -> None:
    for folder in (tmp_path / "none", tmp_path):
        with pytest.raises(AdapterNotFound, match=r"holds no adapter_config\.json"):
            read(folder)
    write_folder(tmp_path, good())
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterNotFound, match=r"holds no adapter_model\.safetensors"):
        read(tmp_path)


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(tmp_path / "sprung"),))

    write_folder(tmp_path, good(), **QUERIES)
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save({"x": Trap()}, tmp_path / "adapter_model.bin")
    refused(tmp_path, "pickle")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"[]", b"[" * 100_000, b'{"r": 1e999}'])
def test_a_config_that_is_none_is_refused(content: bytes, tmp_path: Path) -> None:
    write_folder(tmp_path, good(), **QUERIES)
    (tmp_path / "adapter_config.json").write_bytes(content)
    refused(tmp_path, ".")


def header(tensors: dict[str, Any], length: int | None = None) -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text


A, B = f"{PREFIX}{Q0}.lora_A.weight", f"{PREFIX}{Q0}.lora_B.weight"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 7,
        header({}, 1 << 62),
        header({A: {"dtype": "F32", "shape": [4, 1 << 40], "data_offsets": [0, 1 << 44]}}),
        header({A: {"dtype": "F32", "shape": [4, 64], "data_offsets": [0, 16]}}) + b"\0" * 16,
        header({A: {"dtype": "F32", "shape": [4, 64], "data_offsets": [0, 1024]}}),
        header({A: {"dtype": "F32", "shape": [-4, 64], "data_offsets": [0, 1024]}}),
        header({A: {"dtype": "PICKLE", "shape": [4, 64], "data_offsets": [0, 1024]}}),
    ],
)
def test_a_damaged_file_is_refused(content: bytes, tmp_path: Path) -> None:
    write_folder(tmp_path, good(), **QUERIES)
    (tmp_path / "adapter_model.safetensors").write_bytes(content)
    refused(tmp_path, "damaged")


def test_a_huge_tensor_takes_no_memory(tmp_path: Path) -> None:
    """Its shape is looked at first: a file of 8 GiB (sparse) is refused in a moment."""
    rows, size = 1 << 15, (1 << 15) * (1 << 16) * 4
    write_folder(tmp_path, good(), **QUERIES)
    one = {"dtype": "F32", "shape": [rows, 1 << 16], "data_offsets": [0, size]}
    other = {"dtype": "F32", "shape": [64, 4], "data_offsets": [size, size + 1024]}
    with (tmp_path / "adapter_model.safetensors").open("wb") as file:
        file.write(header({A: one, B: other}))
        file.truncate(file.tell() + size + 1024)
    refused(tmp_path, "expected|missing|without")


def test_pipes_are_not_waited_for(tmp_path: Path) -> None:
    write_folder(tmp_path, good(), **QUERIES)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).unlink()
        os.mkfifo(tmp_path / name)
        refused(tmp_path, "holds no")
        (tmp_path / name).unlink()
        write_folder(tmp_path, good(), **QUERIES)


def test_an_adapter_error_is_a_checkpoint_error() -> None:
    assert issubclass(AdapterError, CheckpointError)


def test_reading_configs_needs_no_torch() -> None:
    code = "import model.lora_config, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_stored_tensors_are_copied_out_of_the_file(tmp_path: Path) -> None:
    """A file cut short while it is mapped would end the process."""
    folder = write_folder(tmp_path, good(), **QUERIES)
    found = read(folder)
    before = {name: one.down.clone() for name, one in found.weights.items()}
    os.truncate(folder / "adapter_model.safetensors", 0)
    assert all(torch.equal(found.weights[name].down, was) for name, was in before.items())
    save_file(good(), folder / "adapter_model.safetensors")


def test_all_of_the_networks_projections_have_a_shape() -> None:
    assert len(SHAPES) == 2 * len(ALL)
    assert SHAPES[Q0] == (64, 64)
