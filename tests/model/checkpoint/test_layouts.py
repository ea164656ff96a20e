"""Every layout, written from small random networks, gives the logits transformers gives."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from model.checkpoint import generation_defaults, inspect, load_config, load_model
from tests.model.checkpoint.logits import difference
from tests.model.checkpoint.writers import (
    FAMILIES,
    LLAMA3_ROPE,
    llama,
    write_gguf,
    write_huggingface,
    write_meta,
)

META_FAMILIES = ("llama", "llama-tied", "llama-wide-heads")
PROMPT = [1, *range(60, 3, -2), 90, 91]
TOLERANCE = 1e-4
Kind = gguf.GGMLQuantizationType


def loaded(path: Path):
    return load_model(path, dtype="float32")


@pytest.mark.parametrize("shards", [False, True], ids=["one-file", "sharded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_huggingface_folder_gives_the_reference_logits(family: str, shards: bool, tmp_path: Path):
    reference = FAMILIES[family]()
    write_huggingface(reference, tmp_path, shards)
    assert (len(inspect(tmp_path).files) > 1) == shards
    assert difference(loaded(tmp_path), reference, PROMPT) < TOLERANCE


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("embedding_axis", [0, 1])
@pytest.mark.parametrize("family", META_FAMILIES)
def test_meta_shards_give_the_reference_logits(
    family: str, embedding_axis: int, ranks: int, tmp_path: Path
):
    reference = FAMILIES[family]()
    params = {"head_dim": 32} if family == "llama-wide-heads" else {}
    write_meta(reference, tmp_path, ranks, embedding_axis, params)
    model = loaded(tmp_path)
    assert difference(model, reference, PROMPT) < TOLERANCE
    assert model.config.tie_embeddings == (family == "llama-tied")
    told = load_config(tmp_path)  # shards cut along other axes hide that they are tied
    assert replace(told, tie_embeddings=model.config.tie_embeddings) == model.config
    assert told.tie_embeddings == model.config.tie_embeddings or ranks > 1


def test_meta_ranks_may_hold_copies_of_the_key_value_heads(tmp_path: Path):
    reference = llama()  # two key-value heads on four ranks
    write_meta(reference, tmp_path, ranks=4)
    whole = [torch.load(tmp_path / f"consolidated.0{rank}.pth") for rank in range(4)]
    for name in [name for name in whole[0] if ".wk." in name or ".wv." in name]:
        heads = torch.cat([shard[name] for shard in whole]).chunk(2)
        for rank, shard in enumerate(whole):
            shard[name] = heads[rank // 2].clone()
    for rank, shard in enumerate(whole):
        torch.save(shard, tmp_path / f"consolidated.0{rank}.pth")
    assert difference(loaded(tmp_path), reference, PROMPT) < TOLERANCE


def test_meta_without_kv_heads_has_one_for_every_head(tmp_path: Path):
    reference = llama(num_key_value_heads=4)
    write_meta(reference, tmp_path, params={"n_kv_heads": None})
    assert difference(loaded(tmp_path), reference, PROMPT) < TOLERANCE


def test_meta_rotary_settings_reach_the_config(tmp_path: Path):
    reference = llama(rope_parameters={**LLAMA3_ROPE, "original_max_position_embeddings": 8192})
    params = {"use_scaled_rope": True, "rope_theta": 10_000.0, "vocab_size": 96}
    write_meta(reference, tmp_path, params=params)
    model = loaded(tmp_path)
    assert (model.config.rope.kind, model.config.rope.factor) == ("llama3", 8.0)
    assert model.config.max_positions == 131_072
    assert difference(model, reference, PROMPT) < TOLERANCE


@pytest.mark.parametrize(
    ("family", "kind"),
    [(family, Kind.F32) for family in FAMILIES] + [("llama", Kind.F16), ("qwen3", Kind.BF16)],
)
def test_gguf_file_gives_the_reference_logits(family: str, kind: Kind, tmp_path: Path):
    reference = write_gguf(FAMILIES[family](), tmp_path / "model.gguf", kind)
    assert difference(loaded(tmp_path / "model.gguf"), reference, PROMPT) < TOLERANCE


@pytest.mark.parametrize(
    "kind",
    [Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K],
    ids=lambda kind: kind.name,
)
def test_quantized_gguf_equals_its_unpacked_weights(kind: Kind, tmp_path: Path):
    wide = llama(hidden_size=256, intermediate_size=256, num_hidden_layers=1)
    reference = write_gguf(wide, tmp_path / "model.gguf", kind)
    assert difference(loaded(tmp_path / "model.gguf"), reference, PROMPT) < TOLERANCE
    assert load_config(tmp_path / "model.gguf").dtype == "bfloat16"


@pytest.mark.parametrize(
    ("kind", "words"),
    [(Kind.Q8_0, "int8 weights, groups of 32"), (Kind.Q4_0, "int4 weights, groups of 32")],
    ids=["Q8_0", "Q4_0"],
)
@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen3"])
def test_gguf_of_plain_blocks_keeps_its_integers(
    family: str, kind: Kind, words: str, tmp_path: Path
):
    reference = write_gguf(FAMILIES[family](), tmp_path / "model.gguf", kind)
    model = loaded(tmp_path / "model.gguf")
    assert model.quantization == words
    assert difference(model, reference, PROMPT) < TOLERANCE
    assert model.num_parameters == reference.num_parameters()


def test_gguf_in_parts_equals_the_whole(tmp_path: Path):
    whole, parts = tmp_path / "model.gguf", tmp_path / "parts"
    reference = write_gguf(llama(), whole)
    parts.mkdir()
    _split_gguf(whole, parts)
    assert len(inspect(parts).files) == 2
    assert difference(loaded(parts), reference, PROMPT) < TOLERANCE


def _split_gguf(whole: Path, folder: Path) -> None:
    """What llama.cpp's gguf-split does: the metadata in the first part, tensors in both."""
    reader = gguf.GGUFReader(whole)
    halves = reader.tensors[:10], reader.tensors[10:]
    for number, tensors in enumerate(halves):
        writer = gguf.GGUFWriter(folder / f"m-{number + 1:05}-of-00002.gguf", "llama")
        if number == 0:
            for field in reader.fields.values():
                if field.name.startswith(("llama.", "tokenizer.")):
                    sub_type = field.types[-1] if len(field.types) > 1 else None
                    writer.add_key_value(field.name, field.contents(), field.types[0], sub_type)
        writer.add_uint16("split.count", 2)
        for tensor in tensors:
            writer.add_tensor(tensor.name, tensor.data.copy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


# --------------------------------------------------------------------------- traps


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_tied_checkpoint_may_hold_only_the_head(tmp_path: Path):
    reference = llama(tie_word_embeddings=True)
    write_huggingface(reference, tmp_path)

    def move(tensors):
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    rewrite(tmp_path, move)
    assert difference(loaded(tmp_path), reference, PROMPT) < TOLERANCE


def test_tied_checkpoint_may_hold_both_equal(tmp_path: Path):
    reference = llama(tie_word_embeddings=True)
    write_huggingface(reference, tmp_path)

    def copy(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    rewrite(tmp_path, copy)
    model = loaded(tmp_path)
    assert model.config.tie_embeddings
    assert difference(model, reference, PROMPT) < TOLERANCE


def test_head_that_differs_from_the_embedding_is_not_tied_whatever_the_config_says(tmp_path: Path):
    reference = llama()
    write_huggingface(reference, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    assert difference(loaded(tmp_path), reference, PROMPT) < TOLERANCE


def test_rotary_buffers_of_old_files_are_ignored(tmp_path: Path):
    reference = llama()
    write_huggingface(reference, tmp_path)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(tmp_path, lambda tensors: tensors.update({name: torch.ones(8)}))
    assert difference(loaded(tmp_path), reference, PROMPT) < TOLERANCE


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_stored_dtype_is_what_auto_means_for_a_gpu_and_the_config(dtype: str, tmp_path: Path):
    from model.checkpoint.loading import resolve_dtype

    write_huggingface(llama().to(getattr(torch, dtype)), tmp_path)
    assert load_config(tmp_path).dtype == dtype
    assert resolve_dtype("auto", dtype, torch.device("cuda")) == getattr(torch, dtype)


def test_config_without_a_dtype_takes_the_files(tmp_path: Path):
    write_huggingface(llama().bfloat16(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_config(tmp_path).dtype == "bfloat16"


def test_auto_never_computes_in_float16_on_a_cpu(tmp_path: Path):
    write_huggingface(llama().half(), tmp_path)
    assert load_model(tmp_path).dtype in {torch.bfloat16, torch.float32}


def test_progress_counts_the_bytes_of_every_tensor(tmp_path: Path):
    write_huggingface(llama(), tmp_path, shards=True)
    calls: list[tuple[int, int]] = []
    load_model(tmp_path, progress=lambda done, total: calls.append((done, total)))
    done = [call[0] for call in calls]
    assert done == sorted(done)
    assert done[-1] == calls[-1][1]
    assert 0 <= inspect(tmp_path).num_bytes - done[-1] < 20_000  # headers


def test_generation_defaults_are_the_checkpoint_s(tmp_path: Path):
    write_huggingface(llama(), tmp_path)
    assert generation_defaults(tmp_path) == {}
    stated = {"temperature": 0.6, "top_p": 0.9, "top_k": "40", "do_sample": True, "min_p": None}
    (tmp_path / "generation_config.json").write_text(json.dumps(stated))
    assert generation_defaults(tmp_path) == {"temperature": 0.6, "top_p": 0.9}


def test_describing_a_checkpoint_imports_no_torch(tmp_path: Path):
    write_huggingface(llama(), tmp_path / "folder")
    write_gguf(llama(), tmp_path / "model.gguf")
    write_meta(llama(), tmp_path / "meta")
    code = (
        "import sys\n"
        "from model.checkpoint import inspect, generation_defaults, load_config\n"
        "from model.checkpoint.hub import resolve\n"
        "for path in sys.argv[1:]:\n"
        "    path = resolve(path)\n"
        "    inspect(path), generation_defaults(path), load_config(path)\n"
        "assert not {'torch', 'huggingface_hub'} & sys.modules.keys()\n"
    )
    paths = [str(tmp_path / name) for name in ("folder", "model.gguf", "meta")]
    subprocess.run([sys.executable, "-c", code, *paths], check=True, timeout=60)
