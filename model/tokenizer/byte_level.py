"""Byte-level BPE built from parts, with the ways Llama's kin split a text into words."""

from __future__ import annotations

from collections.abc import Sequence

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3_SPLIT = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _TAIL
QWEN2_SPLIT = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _TAIL
_GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN_SPLIT = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# GGUF's tokenizer.ggml.pre to the patterns that cut a text, one after the other (llama.cpp's
# names).
SPLITS: dict[str, Sequence[str]] = {
    "default": [r"[\p{P}\$\+<=>\^~\|]+", _GPT2_SPLIT, r"\p{N}+", "[0-9][0-9][0-9]"],
    "deepseek-r1-qwen": [QWEN2_SPLIT],
    "falcon3": [LLAMA3_SPLIT],
    "gpt-2": [_GPT2_SPLIT],
    "llama-bpe": [LLAMA3_SPLIT],
    "llama-v3": [LLAMA3_SPLIT],
    "llama3": [LLAMA3_SPLIT],
    "mpt": [_GPT2_SPLIT],
    "olmo": [_GPT2_SPLIT],
    "pixtral": [LLAMA3_SPLIT],
    "qwen2": [QWEN2_SPLIT],
    "smollm": [r"\p{N}", _GPT2_SPLIT],
    "starcoder": [r"\p{N}", _GPT2_SPLIT],
    "tekken": [_TEKKEN_SPLIT],
}
KEEPS_WHOLE_WORDS = {"falcon3", "llama-bpe", "llama-v3", "llama3", "pixtral", "tekken"}
BEGINS_WITH_BOS = KEEPS_WHOLE_WORDS
COMPOSES_ACCENTS = {"deepseek-r1-qwen", "qwen2"}  # Qwen's own tokenizer.json normalizes to NFC


def byte_level(
    model: models.BPE, splits: Sequence[str], *, composes_accents: bool = False
) -> tokenizers.Tokenizer:
    """Cuts a text by each pattern in turn and merges the bytes of every word."""
    library = tokenizers.Tokenizer(model)
    if composes_accents:
        library.normalizer = normalizers.NFC()
    cuts = [pre_tokenizers.Split(Regex(split), "isolated") for split in splits]
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.pre_tokenizer = pre_tokenizers.Sequence([*cuts, letters])
    library.decoder = decoders.ByteLevel()
    return library
