"""What reads a stranger's files, by name: all that ``pronk serve`` does with a path before it
answers.
"""

from __future__ import annotations

import os
import resource
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from model.chat_template import ChatTemplateError, load_chat_template
from model.checkpoint import CheckpointError, generation_defaults, load_config, load_model
from model.config import InvalidConfig, UnsupportedModel
from model.lora import read_adapter
from model.tokenizer import Tokenizer, TokenizerError, load_tokenizer

REFUSALS = (CheckpointError, TokenizerError, ChatTemplateError, InvalidConfig, UnsupportedModel)
TEXT = "A llama, 1234 <|im_end|> «día» 日本\U0001f999\0\n  x"
MESSAGES = [{"role": "user", "content": TEXT}]
SHAPES = {f"model.layers.{n}.self_attn.q_proj": (64, 64) for n in range(2)}


def read_checkpoint(path: Path) -> None:
    """Config, sampling defaults and weights."""
    load_config(path)
    generation_defaults(path)
    load_model(path, dtype="float32")


def use_tokenizer(path: Path) -> None:
    """Tokenizer and template, both used: what loads must also serve."""
    tokenizer = load_tokenizer(path)
    exercise(tokenizer)
    template = load_chat_template(tokenizer)
    if template is not None:
        template.encode(MESSAGES)


def exercise(tokenizer: Tokenizer) -> None:
    for parse_special in (True, False):
        ids = tokenizer.encode(TEXT, parse_special=parse_special)
        tokenizer.decode(ids, skip_special_tokens=parse_special)
    for token in (*range(min(tokenizer.vocab_size, 600)), tokenizer.vocab_size, 1 << 31, 1 << 40):
        tokenizer.first_bytes(token)
        tokenizer.token_text(token)


def load_adapter(path: Path) -> None:
    read_adapter(path, SHAPES, 64, torch.float32)


def crash(_: Path) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def spin(_: Path) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (1, 2))
    while True:
        pass


def swallow(_: Path) -> None:
    bytearray(4 << 30)


def bug(_: Path) -> None:
    raise KeyError("no refusal")


READERS: dict[str, Callable[[Path], None]] = {
    "checkpoint": read_checkpoint,
    "tokenizer": use_tokenizer,
    "adapter": load_adapter,
    "crash": crash,  # these four test the isolation
    "spin": spin,
    "swallow": swallow,
    "bug": bug,
}


def warm_up() -> None:
    """Imports what is imported late, so that a fork's limits are spent on the file alone."""
    import gguf  # noqa: F401

    import model.checkpoint.gguf
    import model.checkpoint.huggingface
    import model.checkpoint.loading
    import model.checkpoint.meta
    import model.checkpoint.prequantized
    import model.llama
    import model.tokenizer.gguf
    import model.tokenizer.sentencepiece
    import model.tokenizer.tiktoken  # noqa: F401

    with tempfile.TemporaryDirectory() as folder:
        for read in (read_checkpoint, use_tokenizer, load_adapter):
            try:
                read(Path(folder))
            except REFUSALS:
                continue
