"""The tokenizer inside a GGUF file: its metadata holds the vocabulary, the flags and the template.

``tokenizer.ggml.model`` llama is sentencepiece's BPE (a ModelProto is built from tokens, scores and
types, and run by sentencepiece); gpt2 is byte-level BPE, cut into words as ``tokenizer.ggml.pre``
says.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import models

from model.checkpoint.errors import CheckpointError
from model.checkpoint.gguf_header import read_header
from model.tokenizer.byte_level import (
    BEGINS_WITH_BOS,
    COMPOSES_ACCENTS,
    KEEPS_WHOLE_WORDS,
    SPLITS,
    byte_level,
)
from model.tokenizer.config import TokenizerConfig, TokenizerError
from model.tokenizer.huggingface import LibraryTokenizer
from model.tokenizer.interface import Tokenizer
from model.tokenizer.sentencepiece import PieceTokenizer
from model.tokenizer.sentencepiece_proto import Piece, PieceType, bpe_model
from model.tokenizer.special import AddedToken, private_characters

_END_IDS = ("eos_token_id", "eot_token_id", "eom_token_id")
_TEMPLATE = "tokenizer.chat_template"


def load_gguf(path: Path) -> Tokenizer:
    """Raises TokenizerError for a file without a tokenizer or with one of another kind."""
    try:
        return from_metadata(read_header(path).metadata)
    except CheckpointError as error:
        raise TokenizerError(str(error)) from error


def from_metadata(metadata: dict[str, Any]) -> Tokenizer:
    """The tokenizer that GGUF metadata (name to value) describes."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "llama":
        return _pieces(metadata)
    if kind == "gpt2":
        return _byte_level(metadata)
    raise TokenizerError(
        f"the GGUF file's tokenizer is {kind or 'missing'}: llama (sentencepiece) and gpt2 "
        "(byte-level BPE) are the ones known"
    )


def _pieces(metadata: dict[str, Any]) -> PieceTokenizer:
    proto = bpe_model(
        _distinct(_read_pieces(metadata)),
        add_prefix_space=_flag(metadata, "add_space_prefix", True),
        collapse_spaces=_flag(metadata, "remove_extra_whitespaces", False),
    )
    try:
        return PieceTokenizer(proto, _config(metadata, add_bos=True))
    except RuntimeError as error:
        raise TokenizerError(
            f"sentencepiece refuses the GGUF file's vocabulary: {error}"
        ) from error


def _byte_level(metadata: dict[str, Any]) -> LibraryTokenizer:
    split = str(_get(metadata, "pre", "default"))
    if split not in SPLITS:
        raise TokenizerError(
            f"the GGUF file cuts words as {split!r}; the ways known are {', '.join(sorted(SPLITS))}"
        )
    vocabulary = {text: number for number, text in enumerate(_list(metadata, "tokens", str))}
    merges = [tuple(merge.split(" ", 1)) for merge in _list(metadata, "merges", str)]
    if any(len(pair) < 2 for pair in merges):
        raise TokenizerError("the GGUF file has a merge that is not two pieces")
    try:
        model = models.BPE(vocabulary, merges, ignore_merges=split in KEEPS_WHOLE_WORDS)
    except Exception as error:  # the library raises bare Exception
        raise TokenizerError(
            f"the GGUF file's merges do not fit its vocabulary: {error}"
        ) from error
    library = byte_level(model, SPLITS[split], composes_accents=split in COMPOSES_ACCENTS)
    return LibraryTokenizer(library, _config(metadata, add_bos=split in BEGINS_WITH_BOS))


def _read_pieces(metadata: dict[str, Any]) -> Iterator[Piece]:
    tokens = _list(metadata, "tokens", str)
    scores = _list(metadata, "scores", float, [0.0] * len(tokens))
    types = _list(metadata, "token_type", int, [PieceType.NORMAL] * len(tokens))
    if not len(tokens) == len(scores) == len(types):
        raise TokenizerError("the GGUF file's tokens, scores and types differ in number")
    if strange := set(types) - set(PieceType):
        raise TokenizerError(f"the GGUF file has tokens of the unknown type {min(strange)}")
    yield from map(Piece, tokens, scores, types)


def _distinct(pieces: Iterator[Piece]) -> Iterator[Piece]:
    """Sentencepiece refuses a second piece of the same text (padding has them): it gets a secret
    name.
    """
    seen: set[str] = set()
    for number, piece in enumerate(pieces):
        if not piece.text or piece.text in seen:
            name = f"{private_characters(2)}{number:x}"
            yield Piece(name, piece.score, PieceType.UNUSED)
            continue
        seen.add(piece.text)
        yield piece


def _config(metadata: dict[str, Any], *, add_bos: bool) -> TokenizerConfig:
    tokens = _list(metadata, "tokens", str)
    named = ("bos", "eos", "unknown", "padding", "seperator")  # GGUF spells the last one so
    numbers = {name: _id(metadata, f"{name}_token_id") for name in named}
    texts = {
        _NAMES.get(name, f"{name}_token"): tokens[number]
        for name, number in numbers.items()
        if number is not None and number < len(tokens)
    }
    ends = [_id(metadata, name) for name in _END_IDS]
    return TokenizerConfig(
        named_tokens=texts,
        declared=tuple(_declared(metadata)),
        add_bos=_flag(metadata, "add_bos_token", add_bos),
        add_eos=_flag(metadata, "add_eos_token", False),
        bos_id=numbers["bos"],
        eos_ids=tuple(number for number in ends if number is not None),
        chat_templates=_templates(metadata),
    )


_NAMES = {"unknown": "unk_token", "padding": "pad_token", "seperator": "sep_token"}


def _declared(metadata: dict[str, Any]) -> Iterator[AddedToken]:
    """Control tokens; of byte-level vocabularies the user-defined ones too (no letters)."""
    tokens = _list(metadata, "tokens", str)
    types = _list(metadata, "token_type", int)
    if len(types) > len(tokens):
        raise TokenizerError("the GGUF file's tokens, scores and types differ in number")
    is_byte_level = metadata.get("tokenizer.ggml.model") == "gpt2"
    for number, kind in enumerate(types):
        if kind == PieceType.CONTROL:
            yield AddedToken(number, tokens[number])
        elif kind == PieceType.USER_DEFINED and is_byte_level:
            yield AddedToken(number, tokens[number], special=False)


def _templates(metadata: dict[str, Any]) -> dict[str, str]:
    """tokenizer.chat_template and the named ones beside it."""
    named = {
        key.removeprefix(f"{_TEMPLATE}."): source
        for key, source in metadata.items()
        if key.startswith(f"{_TEMPLATE}.") and isinstance(source, str)
    }
    default = metadata.get(_TEMPLATE)
    return {"default": default, **named} if isinstance(default, str) else named


def _get(metadata: dict[str, Any], name: str, default: Any) -> Any:
    return metadata.get(f"tokenizer.ggml.{name}", default)


def _list(
    metadata: dict[str, Any], name: str, kind: type, default: Sequence[Any] = ()
) -> list[Any]:
    """The format's lists are of one type, so one item tells of all."""
    found = _get(metadata, name, list(default))
    if not isinstance(found, list) or not isinstance(next(iter(found), kind()), kind):
        raise TokenizerError(f"tokenizer.ggml.{name} in the GGUF file is no list of {_WORDS[kind]}")
    return found


_WORDS = {str: "texts", int: "whole numbers", float: "numbers"}


def _flag(metadata: dict[str, Any], name: str, default: bool) -> bool:
    found = _get(metadata, name, default)
    if not isinstance(found, bool):
        raise TokenizerError(f"tokenizer.ggml.{name} in the GGUF file is {found!r}, not a boolean")
    return found


def _id(metadata: dict[str, Any], name: str) -> int | None:
    """Padding ids of -1 stand for none."""
    found = _get(metadata, name, None)
    if found is not None and (not isinstance(found, int) or isinstance(found, bool)):
        raise TokenizerError(f"tokenizer.ggml.{name} in the GGUF file is {found!r}, not a number")
    return found if found is not None and 0 <= found < 1 << 31 else None
