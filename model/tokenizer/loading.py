"""Picking the tokenizer a checkpoint brings."""

from __future__ import annotations

import re
from pathlib import Path

from model.tokenizer.config import TokenizerError, read_config
from model.tokenizer.interface import Tokenizer
from model.tokenizer.native import refusing

_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")
_LFS_POINTER = b"version https://git-lfs"


def load_tokenizer(path: Path | str) -> Tokenizer:
    """The tokenizer of a folder, a tokenizer file or a .gguf.

    In a folder tokenizer.json comes first (what it says is what the model was trained with), then
    tokenizer.model, sentencepiece or tiktoken by its contents, then a GGUF file. Raises
    TokenizerError saying what is missing.
    """
    file = _tokenizer_file(Path(path))
    with refusing(lambda why: TokenizerError(f"{file.name} makes no tokenizer: {why}")):
        return _load(file)


def _load(file: Path) -> Tokenizer:
    with file.open("rb") as opened:
        head = opened.read(4096)
    if head.startswith(_LFS_POINTER):
        raise TokenizerError(f"{file.name} is a Git LFS pointer, not the file: run `git lfs pull`")
    if head.startswith(b"GGUF"):
        from model.tokenizer.gguf import load_gguf

        return load_gguf(file)
    config = read_config(file.parent)
    if file.suffix == ".json":
        from model.tokenizer.huggingface import load_json

        return load_json(file, config)
    if _TIKTOKEN_LINE.match(head):
        from model.tokenizer.tiktoken import load_tiktoken

        return load_tiktoken(file, config)
    from model.tokenizer.sentencepiece import load_sentencepiece

    return load_sentencepiece(file, config)


def _tokenizer_file(path: Path) -> Path:
    if path.is_file():
        return path
    for name in ("tokenizer.json", "tokenizer.model"):
        if (path / name).is_file():
            return path / name
    others = [*sorted(path.glob("tokenizer.model.v*"), reverse=True), *sorted(path.glob("*.gguf"))]
    for other in filter(Path.is_file, others):
        return other
    raise TokenizerError(_what_is_missing(path))


def _what_is_missing(path: Path) -> str:
    if not path.is_dir():
        return f"there is no tokenizer at {path}"
    if (path / "tekken.json").is_file():
        return f"{path.name} has tekken.json only: add the tokenizer.json of the Hugging Face model"
    return (
        f"{path.name} has no tokenizer.json and no tokenizer.model: copy one of them beside the "
        "weights"
    )
