"""Llama 3's ``tokenizer.model``: tiktoken's lines of base64 and rank, and Meta's special tokens.

The ranks become merges (every way to cut a token into two tokens, in order of rank), which is how
the published tokenizer.json was made; so the tokenizers library gives the same ids as that file.
"""

from __future__ import annotations

import base64
import binascii
from pathlib import Path

import tokenizers
from tokenizers import models

from model.tokenizer.byte_level import LLAMA3_SPLIT, byte_level
from model.tokenizer.config import TokenizerConfig, TokenizerError
from model.tokenizer.huggingface import LibraryTokenizer, byte_letters
from model.tokenizer.special import AddedToken

_NUM_RESERVED = 256
# The names and their order are Meta's (llama-models, models/llama3/tokenizer.py).
_NAMED = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    "<|image|>",
)
_STOPS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")


def load_tiktoken(path: Path, config: TokenizerConfig) -> LibraryTokenizer:
    """Raises TokenizerError for lines that are not base64 and rank."""
    pieces = _read_ranks(path)
    special = llama3_special_tokens(len(pieces))
    declared = {token.id: token for token in [*special, *config.declared]}
    ids = {token.text: token.id for token in declared.values()}
    config = config.with_defaults(
        named_tokens={"bos_token": _NAMED[0], "eos_token": _NAMED[1]},
        eos_ids=tuple(ids[text] for text in _STOPS if text in ids),
        add_bos=True,
    )
    config = TokenizerConfig(**{**vars(config), "declared": tuple(declared.values())})
    return LibraryTokenizer(_library(pieces), config)


def llama3_special_tokens(num_pieces: int) -> list[AddedToken]:
    """Meta's 256 special tokens, behind the vocabulary's pieces."""
    reserved = (f"<|reserved_special_token_{2 + i}|>" for i in range(_NUM_RESERVED - len(_NAMED)))
    return [AddedToken(num_pieces + i, text) for i, text in enumerate([*_NAMED, *reserved])]


def _read_ranks(path: Path) -> list[bytes]:
    """The pieces in order of rank."""
    ranks: dict[int, bytes] = {}
    try:
        for line in path.read_bytes().splitlines():
            if line:
                piece, rank = line.split()
                ranks[int(rank)] = base64.b64decode(piece, validate=True)
    except (ValueError, binascii.Error) as error:
        raise TokenizerError(
            f"{path.name} has a line that is not base64 and rank: {error}"
        ) from error
    if sorted(ranks) != list(range(len(ranks))):
        raise TokenizerError(f"{path.name} leaves ranks out")
    return [ranks[rank] for rank in range(len(ranks))]


def _library(pieces: list[bytes]) -> tokenizers.Tokenizer:
    letters = byte_letters(pieces)
    vocabulary = {text: rank for rank, text in enumerate(letters)}
    model = models.BPE(vocabulary, _merges(letters, vocabulary), ignore_merges=True)
    return byte_level(model, [LLAMA3_SPLIT])


def _merges(letters: list[str], ranks: dict[str, int]) -> list[tuple[str, str]]:
    """Every cut of every token into two tokens; a plain loop, because it runs a million times."""
    merges = []
    for text in letters:
        cuts = [
            (ranks[left], ranks[right], left, right)
            for at in range(1, len(text))
            if (left := text[:at]) in ranks and (right := text[at:]) in ranks
        ]
        cuts.sort()
        merges += [(left, right) for _, _, left, right in cuts]
    return merges
