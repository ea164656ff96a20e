"""Write a random checkpoint's weights as the GGUF file that llama.cpp's servers read.

    python -m tests.benchmarks.gguf_checkpoint /tmp/random-135m /tmp/135m.gguf --type Q8_0

Every matrix gets the type asked for. Of a 4-bit file the embedding and the head have 8 bits, as in
pronk's own int4 (llama.cpp's own quantizer gives them 6.6). Norms stay float32, as llama.cpp wants
them.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from safetensors import safe_open
from torch import Tensor

LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
TYPES = ("BF16", "Q8_0", "Q4_0")
FILE_TYPES = {"BF16": 32, "Q8_0": 7, "Q4_0": 2}  # llama.cpp's numbers for a whole file's type


def write(folder: Path, path: Path, type_name: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    kind = GGMLQuantizationType[type_name]
    writer = gguf.GGUFWriter(path, "llama")
    _add_metadata(writer, config, type_name)
    _add_tokenizer(writer, folder, config)
    with safe_open(folder / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118 (no dict)
            _add_tensor(writer, name, file.get_tensor(name), config, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_metadata(writer: gguf.GGUFWriter, config: dict[str, Any], type_name: str) -> None:
    writer.add_name("random")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(FILE_TYPES[type_name])


def _add_tokenizer(writer: gguf.GGUFWriter, folder: Path, config: dict[str, Any]) -> None:
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    tokens: list[str] = [f"[unused {number}]" for number in range(config["vocab_size"])]
    types = [gguf.TokenType.UNUSED] * len(tokens)
    for token, number in model["vocab"].items():
        tokens[number], types[number] = token, gguf.TokenType.NORMAL
    for number in (config["bos_token_id"], config["eos_token_id"]):
        types[number] = gguf.TokenType.CONTROL
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)


def _add_tensor(
    writer: gguf.GGUFWriter,
    name: str,
    tensor: Tensor,
    config: dict[str, Any],
    kind: GGMLQuantizationType,
) -> None:
    if name.endswith("q_proj.weight"):
        tensor = _in_pairs(tensor, config["num_attention_heads"])
    elif name.endswith("k_proj.weight"):
        tensor = _in_pairs(tensor, config["num_key_value_heads"])
    if kind is GGMLQuantizationType.Q4_0 and "layers" not in name:
        kind = GGMLQuantizationType.Q8_0
    if tensor.dim() == 1:
        writer.add_tensor(gguf_name(name), tensor.float().numpy())
    elif kind is GGMLQuantizationType.BF16:
        data = tensor.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
        writer.add_tensor(gguf_name(name), data, raw_dtype=kind)
    else:
        data = gguf.quants.quantize(tensor.float().numpy().astype(np.float32), kind)
        writer.add_tensor(gguf_name(name), data, raw_dtype=kind)


def gguf_name(name: str) -> str:
    if found := re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", name):
        return f"blk.{found[1]}.{LAYER_NAMES[found[2]]}.weight"
    return NAMES[name]


def _in_pairs(tensor: Tensor, heads: int) -> Tensor:
    """Rows of each head from rotary halves to rotary pairs, as llama.cpp's llama turns them."""
    size = tensor.shape[0] // heads
    return tensor.view(heads, 2, size // 2, -1).transpose(1, 2).reshape(tensor.shape)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--type", choices=TYPES, default="BF16")
    options = parser.parse_args()
    write(options.folder, options.file, options.type)


if __name__ == "__main__":
    main()
