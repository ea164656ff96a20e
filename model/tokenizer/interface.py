"""What every tokenizer can do, whatever file it came from.

The rule of decoding: a text is its tokens' bytes, joined and decoded as UTF-8 with replacement
(maximal invalid parts, as Python does). The tokenizers library decodes otherwise (one bad byte
spoils the run of byte tokens around it), so its decoder is not used: ``token_bytes`` is the ground
truth here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from model.tokenizer.config import TokenizerConfig, TokenizerError
from model.tokenizer.special import AddedToken, Spellings

__all__ = ["Segment", "TextNotEncodable", "Tokenizer", "TokenizerError"]


class TextNotEncodable(ValueError):
    """The text has no UTF-8 form (a lone surrogate): the client's mistake."""


class Segment(NamedTuple):
    """A run of text, or the spelling of one special token that is meant as that token."""

    text: str
    is_special: bool


class Tokenizer(ABC):
    """Thread-safe and immutable once built. Subclasses say how plain text becomes ids."""

    def __init__(
        self,
        config: TokenizerConfig,
        added: Iterable[AddedToken],
        *,
        vocab_size: int,
        prefix: Sequence[int],
        suffix: Sequence[int],
        drops_first_space: bool,
    ) -> None:
        """``prefix`` and ``suffix`` are what add_special_tokens puts around a text;
        ``drops_first_space`` says that encoding puts a space before a text, which decoding from its
        start takes away.
        """
        self.added = {token.id: token for token in added}
        self.vocab_size = vocab_size
        self.drops_first_space = drops_first_space
        self.chat_templates: Mapping[str, str] = config.chat_templates
        ids = {token.text: token.id for token in self.added.values()}
        self.named_tokens = dict(
            config.named_tokens
        )  # "bos_token" and so on: what chat templates may name
        self.bos_id = ids.get(config.named_tokens.get("bos_token", ""), config.bos_id)
        if self.bos_id is None and len(prefix) == 1:
            self.bos_id = prefix[0]
        named_eos = ids.get(config.named_tokens.get("eos_token", ""))
        self.eos_ids = _distinct([named_eos, *config.eos_ids])
        for name, token in (
            ("bos_token", self.bos_id),
            ("eos_token", next(iter(self.eos_ids), None)),
        ):
            if token in self.added:
                self.named_tokens.setdefault(name, self.added[token].text)
        self.special_tokens = {
            token.text: token.id for token in self.added.values() if token.special
        }
        self.spellings = Spellings(token for token in self.added.values() if token.is_guarded)
        self.prefix, self.suffix = self._surroundings(config, tuple(prefix), tuple(suffix))
        self._special_ids = frozenset(self.special_tokens.values())
        self._bytes: dict[int, bytes] = {}

    @property
    def chat_template(self) -> str | None:
        """The checkpoint's own template (the default one where it names several), or None."""
        return self.chat_templates.get("default") or next(iter(self.chat_templates.values()), None)

    def encode(
        self, text: str, *, add_special_tokens: bool = True, parse_special: bool = True
    ) -> list[int]:
        """The ids of a text. Without ``parse_special`` a special token's spelling stays text."""
        require_encodable(text)
        ids = self._encode(text, parse_special) if text else []
        return [*self.prefix, *ids, *self.suffix] if add_special_tokens else ids

    def encode_segments(self, segments: Sequence[Segment]) -> list[int]:
        """The ids of a text of which only the segments that say so are special tokens."""
        for segment in segments:
            require_encodable(segment.text)
        return self._encode_segments([segment for segment in segments if segment.text])

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of ids that begin a text: the space that encoding put before it is dropped."""
        parts = []
        at_start = self.drops_first_space
        for token in ids:
            if self.is_special(token):
                if not skip_special_tokens:
                    parts.append(self.token_bytes(token))
                continue
            parts.append(self.first_bytes(token) if at_start else self.token_bytes(token))
            at_start = False
        return b"".join(parts).decode("utf-8", "replace")

    def token_bytes(self, token: int) -> bytes:
        """The bytes a token adds to a text; none for an id past the vocabulary (padding)."""
        found = self._bytes.get(token)
        if found is None:
            known = self.added.get(token)
            found = known.text.encode() if known else self._token_bytes(token)
            self._bytes[token] = found
        return found

    def first_bytes(self, token: int) -> bytes:
        """The bytes of a text's first token, without the space that encoding put before it."""
        found = self.token_bytes(token)
        starts_with_space = found[:1] == b" " and token not in self.added
        return found[1:] if starts_with_space and self._is_spelled_out(token) else found

    def token_text(self, token: int) -> str:
        """A token alone, for people: bytes that are no whole character show as the replacement
        sign.
        """
        return self.token_bytes(token).decode("utf-8", "replace")

    def is_special(self, token: int) -> bool:
        return token in self._special_ids

    @abstractmethod
    def token_to_id(self, text: str) -> int | None:
        """The id of a token by its spelling in the vocabulary."""

    @abstractmethod
    def _encode(self, text: str, parse_special: bool) -> list[int]: ...

    @abstractmethod
    def _encode_segments(self, segments: list[Segment]) -> list[int]: ...

    @abstractmethod
    def _token_bytes(self, token: int) -> bytes:
        """The bytes of a token that is not an added one; none when there is no such token."""

    @abstractmethod
    def _is_spelled_out(self, token: int) -> bool:
        """Whether a token is a piece of text rather than one raw byte."""

    def _surroundings(
        self, config: TokenizerConfig, prefix: tuple[int, ...], suffix: tuple[int, ...]
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """add_bos_token and add_eos_token, where stated, overrule what the vocabulary file does."""
        if config.add_bos is not None:
            prefix = (self.bos_id,) if config.add_bos and self.bos_id is not None else ()
        if config.add_eos is not None:
            suffix = self.eos_ids[:1] if config.add_eos else ()
        return prefix, suffix


def require_encodable(text: str) -> None:
    """Raises TextNotEncodable for text that UTF-8 cannot carry."""
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TextNotEncodable(
            f"the text has a lone surrogate (U+{ord(text[error.start]):04X}) at character "
            f"{error.start}: it has no UTF-8 form; send whole characters"
        ) from None


def _distinct(ids: Iterable[int | None]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(token for token in ids if token is not None))
