"""tokenizer.json and everything else that the tokenizers library runs (tiktoken ranks, GGUF's
gpt2).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import tokenizers

from model.tokenizer.config import TokenizerConfig, TokenizerError
from model.tokenizer.interface import Segment, TextNotEncodable, Tokenizer
from model.tokenizer.native import refusing
from model.tokenizer.special import AddedToken

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "▁"


def load_json(path: Path, config: TokenizerConfig) -> LibraryTokenizer:
    """A tokenizer.json; raises TokenizerError when the library cannot read it."""
    try:
        library = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise TokenizerError(
            f"{path.name} is no file the tokenizers library reads: {error}"
        ) from error
    return LibraryTokenizer(library, config)


class LibraryTokenizer(Tokenizer):
    """Two library tokenizers over one vocabulary: one parses special tokens in text, the other
    knows them only by their private spellings.
    """

    def __init__(self, library: tokenizers.Tokenizer, config: TokenizerConfig) -> None:
        library.no_truncation()
        library.no_padding()
        if config.declared or any(token.normalized for token in _library_added(library).values()):
            _declare(library, config)
        added = _merged_added(library, config)
        prefix, suffix = _post_processed(library)
        self._decoder = _Decoder(library)
        super().__init__(
            config,
            added,
            vocab_size=max(library.get_vocab_size(), *(token.id + 1 for token in added), 0),
            prefix=prefix,
            suffix=suffix,
            drops_first_space=self._decoder.drops_first_space,
        )
        self._parsing = library
        self._parsing_ids = _renumbering(library, {token.text: token.id for token in added})
        self._private = _same_pipeline(library)
        self._private_ids = self._add_privately(added)

    def token_to_id(self, text: str) -> int | None:
        found = next((token.id for token in self.added.values() if token.text == text), None)
        return self._parsing.token_to_id(text) if found is None else found

    def _encode(self, text: str, parse_special: bool) -> list[int]:
        if parse_special:
            return _run(self._parsing, text, self._parsing_ids)
        return _run(self._private, text, self._private_ids)

    def _encode_segments(self, segments: list[Segment]) -> list[int]:
        spelled = (self._spelled(segment) for segment in segments)
        return _run(self._private, "".join(spelled), self._private_ids)

    def _spelled(self, segment: Segment) -> str:
        return self.spellings.private[segment.text] if segment.is_special else segment.text

    def _token_bytes(self, token: int) -> bytes:
        text = self._parsing.id_to_token(token) if 0 <= token < 1 << 32 else None
        return b"" if text is None else self._decoder.token_bytes(text)

    def _is_spelled_out(self, token: int) -> bool:
        text = self._parsing.id_to_token(token)
        return text is not None and text.startswith(_SPACE)

    def _add_privately(self, added: list[AddedToken]) -> dict[int, int]:
        """Gives the guarded tokens their private spellings; returns library id to id."""
        ids = {}
        for token in added:
            text = self.spellings.private.get(token.text, token.text)
            self._private.add_special_tokens([_library_token(replace(token, text=text))])
            ids[text] = token.id
        return _renumbering(self._private, ids)


class _Decoder:
    """How this vocabulary writes bytes: GPT-2's alphabet of 256 letters, or ▁ and <0xNN>."""

    def __init__(self, library: tokenizers.Tokenizer) -> None:
        steps = [*_steps(library.decoder), *_steps(library.pre_tokenizer)]
        kinds = {step["type"] for step in steps}
        self.is_byte_level = "ByteLevel" in kinds
        if not self.is_byte_level and not kinds & {"Replace", "Metaspace", "ByteFallback"}:
            raise TokenizerError(
                "tokenizer.json is neither byte-level nor sentencepiece-like: its decoder is "
                f"{sorted(kinds) or 'missing'}, which no Llama-family model uses"
            )
        self.drops_first_space = not self.is_byte_level and any(map(_strips_start, steps))

    def token_bytes(self, text: str) -> bytes:
        if self.is_byte_level:
            try:
                return bytes(map(_BYTE_OF_LETTER.__getitem__, text))
            except KeyError:
                return text.encode()
        if found := _BYTE_TOKEN.fullmatch(text):
            return bytes.fromhex(found[1])
        return text.replace(_SPACE, " ").encode()


def _steps(part: Any) -> Iterator[dict[str, Any]]:
    """The elementary steps of a decoder or pre-tokenizer, sequences unrolled."""
    if part is None:
        return
    pending = [json.loads(part.__getstate__())]
    while pending:
        step = pending.pop()
        yield step
        pending.extend(step.get("decoders") or step.get("pretokenizers") or [])


def _strips_start(step: dict[str, Any]) -> bool:
    if step["type"] == "Strip":
        return bool(step.get("content") == " " and step.get("start", 0) > 0)
    return bool(step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never")


def _byte_of_letter() -> dict[str, int]:
    """GPT-2's byte alphabet: printable Latin-1 stands for itself, the rest for letters from U+0100
    on.
    """
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in kept]
    letters = {chr(byte): byte for byte in kept}
    return letters | {chr(0x100 + number): byte for number, byte in enumerate(moved)}


_BYTE_OF_LETTER = _byte_of_letter()
LETTER_OF_BYTE = {byte: letter for letter, byte in _BYTE_OF_LETTER.items()}


def _library_token(token: AddedToken) -> tokenizers.AddedToken:
    """Never normalized: a normalizer that puts ▁ first would keep the token from matching."""
    return tokenizers.AddedToken(
        token.text,
        special=True,
        normalized=False,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        single_word=token.single_word,
    )


def _library_added(library: tokenizers.Tokenizer) -> dict[int, Any]:
    added: dict[int, Any] = library.get_added_tokens_decoder()
    return added


def _declare(library: tokenizers.Tokenizer, config: TokenizerConfig) -> None:
    """Adds what only tokenizer_config.json declares, and un-normalizes the file's specials."""
    known = _library_added(library)
    for number, token in known.items():
        if token.normalized and token.special:
            library.add_special_tokens([_library_token(_from_library(number, token))])
    contents = {token.content for token in known.values()}
    for declared in config.declared:
        if declared.text and declared.text not in contents:
            library.add_special_tokens([_library_token(declared)])


def _merged_added(library: tokenizers.Tokenizer, config: TokenizerConfig) -> list[AddedToken]:
    """The file's added tokens with the flags and ids that tokenizer_config.json states for them."""
    declared = {token.text: token for token in config.declared}
    named = set(config.named_tokens.values())
    merged = []
    for number, token in sorted(_library_added(library).items()):
        own = declared.get(token.content) or _from_library(number, token)
        merged.append(replace(own, special=own.special or own.text in named))
    return merged


def _from_library(number: int, token: Any) -> AddedToken:
    flags = {name: getattr(token, name) for name in ("special", "lstrip", "rstrip", "single_word")}
    return AddedToken(number, token.content, **flags)


def _post_processed(library: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """What the file's post-processor puts before and after a text."""
    plain: list[int] = library.encode("a", add_special_tokens=False).ids
    whole: list[int] = library.encode("a", add_special_tokens=True).ids
    for start in range(len(whole) - len(plain) + 1):
        if plain and whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    raise TokenizerError("the post-processor of tokenizer.json rewrites the text's own tokens")


def _same_pipeline(library: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """A tokenizer over the same (shared, not copied) vocabulary, without added tokens."""
    twin = tokenizers.Tokenizer(library.model)
    if library.normalizer is not None:
        twin.normalizer = library.normalizer
    if library.pre_tokenizer is not None:
        twin.pre_tokenizer = library.pre_tokenizer
    return twin


def _renumbering(library: tokenizers.Tokenizer, ids: dict[str, int]) -> dict[int, int]:
    """The ids that the library gives otherwise than the checkpoint does."""
    given = ((library.token_to_id(text), token) for text, token in ids.items())
    return {own: token for own, token in given if own is not None and own != token}


def _run(library: tokenizers.Tokenizer, text: str, renumbering: dict[int, int]) -> list[int]:
    """Encodes without the interpreter lock (only the batch call releases it)."""
    with refusing(lambda why: TextNotEncodable(f"the tokenizer fails on this text: {why}")):
        ids: list[int] = library.encode_batch_fast([text], add_special_tokens=False)[0].ids
    if renumbering and not renumbering.keys().isdisjoint(ids):
        return [renumbering.get(token, token) for token in ids]
    return ids


def byte_letters(pieces: Iterable[bytes]) -> list[str]:
    """Byte strings written in GPT-2's alphabet, as byte-level vocabularies hold them."""
    table = {byte: LETTER_OF_BYTE[byte] for byte in range(256)}
    return [piece.decode("latin-1").translate(table) for piece in pieces]
