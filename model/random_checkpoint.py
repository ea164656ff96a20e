"""Write a random-weight checkpoint of a real shape, tokenizer included, for benchmarks.

    python -m model.random_checkpoint 135m /tmp/random-135m

Shapes: ``135m`` is SmolLM2-135M's, ``1b`` Llama-3.2-1B's, ``8b`` Llama-3.1-8B's; ``tiny`` is for
tests of the benchmarks themselves. The text such a model writes is noise; the work a server does
for it is the real thing. Imports torch only to draw weights.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

SHAPES: dict[str, dict[str, object]] = {
    "135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
    },
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
    },
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 16384,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 2048,
        "max_position_embeddings": 4096,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
    },
}


def write(shape: str, folder: Path) -> None:
    """A Hugging Face folder with bf16 weights drawn from N(0, 0.02), seed 0."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": "bfloat16",
        **SHAPES[shape],
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    write_weights(config, folder)
    write_tokenizer(int(str(config["vocab_size"])), folder)


def num_parameters(shape: str) -> int:
    """Of a step's reading: an embedding that is tied is the head and counts once."""
    config = {name: value for name, value in SHAPES[shape].items() if isinstance(value, int)}
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    width = hidden // config["num_attention_heads"]
    attention = 2 * hidden * hidden + 2 * hidden * config["num_key_value_heads"] * width
    layer = attention + 3 * hidden * inner + 2 * hidden
    return config["num_hidden_layers"] * layer + config["vocab_size"] * hidden + hidden


def write_weights(config: dict[str, object], folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    hidden, inner = int(str(config["hidden_size"])), int(str(config["intermediate_size"]))
    heads, kv_heads = (
        int(str(config["num_attention_heads"])),
        int(str(config["num_key_value_heads"])),
    )
    size = hidden // heads

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float32).mul_(0.02).to(torch.bfloat16)

    ones = torch.ones(hidden, dtype=torch.bfloat16)
    tensors = {"model.embed_tokens.weight": draw(int(str(config["vocab_size"])), hidden)}
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = draw(int(str(config["vocab_size"])), hidden)
    tensors["model.norm.weight"] = ones.clone()
    for layer in range(int(str(config["num_hidden_layers"]))):
        prefix = f"model.layers.{layer}"
        tensors |= {
            f"{prefix}.self_attn.q_proj.weight": draw(heads * size, hidden),
            f"{prefix}.self_attn.k_proj.weight": draw(kv_heads * size, hidden),
            f"{prefix}.self_attn.v_proj.weight": draw(kv_heads * size, hidden),
            f"{prefix}.self_attn.o_proj.weight": draw(hidden, heads * size),
            f"{prefix}.mlp.gate_proj.weight": draw(inner, hidden),
            f"{prefix}.mlp.up_proj.weight": draw(inner, hidden),
            f"{prefix}.mlp.down_proj.weight": draw(hidden, inner),
            f"{prefix}.input_layernorm.weight": ones.clone(),
            f"{prefix}.post_attention_layernorm.weight": ones.clone(),
        }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def write_tokenizer(size: int, folder: Path) -> None:
    """A byte-level BPE of exactly ``size`` tokens, each of them readable letters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {"<s>": 0, "</s>": 1}
    for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[symbol] = len(vocabulary)
    letters = "abcdefghijklmnopqrstuvwxyz"
    pairs = ["".join(pair) for pair in itertools.product(letters, repeat=2)]
    merges = [(pair[0], pair[1]) for pair in pairs]
    merges += [(left, right) for left in pairs for right in pairs]
    for left, right in merges:
        if len(vocabulary) == size:
            break
        vocabulary.setdefault(left + right, len(vocabulary))
    kept = [pair for pair in merges if "".join(pair) in vocabulary]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=kept))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    write(options.shape, options.folder)


if __name__ == "__main__":
    main()
