"""The trained network as a Hugging Face folder that any Llama loader reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

from model.bundled.corpus import CONTROL, END_OF_TURN

CHAT_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{%- if message['role'] in ['system', 'developer'] %}{%- set opener = '<|system|>' %}"
    "{%- elif message['role'] == 'assistant' %}{%- set opener = '<|assistant|>' %}"
    "{%- else %}{%- set opener = '<|user|>' %}"
    "{%- endif %}"
    "{{- opener }}"
    "{%- if message['content'] is string %}{{- message['content'] | trim }}"
    "{%- elif message['content'] %}"
    "{%- for part in message['content'] %}{{- part['text'] }}{%- endfor %}"
    "{%- endif %}"
    "{{- '<|end|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
)


def export(network: LlamaForCausalLM, tokenizer_model: Path, out: Path) -> None:
    """Tied weights are stored once, in bfloat16."""
    out.mkdir(parents=True, exist_ok=True)
    weights = {
        name: value.detach().to(torch.bfloat16).contiguous()
        for name, value in network.state_dict().items()
        if name != "lm_head.weight"
    }
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)
    if tokenizer_model.resolve() != (out / "tokenizer.model").resolve():
        shutil.copyfile(tokenizer_model, out / "tokenizer.model")
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_model))
    end = pieces.piece_to_id(END_OF_TURN)
    _write(out / "config.json", _config(network, end))
    _write(out / "generation_config.json", _generation_config(end))
    _write(out / "tokenizer_config.json", _tokenizer_config(pieces))


def _config(network: LlamaForCausalLM, end: int) -> dict[str, Any]:
    config = network.config
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": [2, end],
        "torch_dtype": "bfloat16",
    }


def _generation_config(end: int) -> dict[str, Any]:
    return {
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.9,
        "bos_token_id": 1,
        "eos_token_id": [2, end],
        "pad_token_id": 2,
    }


def _tokenizer_config(pieces: sentencepiece.SentencePieceProcessor) -> dict[str, Any]:
    special = ["<unk>", "<s>", "</s>", *CONTROL.values(), END_OF_TURN]
    token = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "add_prefix_space": False,
        "legacy": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "</s>",
        "additional_special_tokens": special[3:],
        "added_tokens_decoder": {
            str(pieces.piece_to_id(text)): {"content": text, **token, "special": True}
            for text in special
        },
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1024,
        "chat_template": CHAT_TEMPLATE,
    }


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
