"""Special tokens as text: which spellings are guarded, finding them, and spelling them privately.

A guarded spelling becomes its token only where the caller means it (a completion prompt, what a
chat template itself writes), never in a chat's contents. To encode a text that holds both, the
meant ones are written in a private spelling that no client can guess, so that one call of the
library encodes the whole text and treats the borders between tokens and text exactly as the
checkpoint does.
"""

from __future__ import annotations

import os.path
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass

_MARKUP = re.compile(r"[<\[{].*[>\]}]", re.DOTALL)
_PRIVATE_PLANE = 0x100000  # private use area B: kept by every Unicode normal form


@dataclass(frozen=True)
class AddedToken:
    """A token that stands beside the vocabulary's pieces, matched as a whole in text."""

    id: int
    text: str
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False

    @property
    def is_guarded(self) -> bool:
        """Special, or shaped like markup (``<tool_call>``); not the runs of blanks some
        vocabularies add.
        """
        return bool(self.text) and (self.special or _MARKUP.fullmatch(self.text) is not None)


class Spellings:
    """Finds guarded spellings in text, the longest first; ``private`` holds their secret names."""

    def __init__(self, tokens: Iterable[AddedToken]) -> None:
        self.tokens = {token.text: token for token in tokens}
        words = [text for text, token in self.tokens.items() if token.single_word]
        parts = [
            any_of(self.tokens.keys() - words),
            rf"(?<!\w){any_of(words)}(?!\w)" if words else "",
        ]
        pattern = "|".join(filter(None, parts))
        self.pattern = re.compile(f"({pattern})" if pattern else "(?!)()")
        secret = private_characters(3)
        self.private = {
            text: f"{secret}{token.id:x}{secret[0]}" for text, token in self.tokens.items()
        }

    def split(self, text: str) -> list[tuple[str, AddedToken | None]]:
        """The text cut at every spelling; runs of text carry None and may be empty.

        A token that strips takes the blanks beside it along, as the tokenizers library does.
        """
        runs = self.pattern.split(text)  # texts at even places, spellings between them
        cut: list[tuple[str, AddedToken | None]] = [(runs[0], None)]
        for spelling, following in zip(runs[1::2], runs[2::2], strict=True):
            token = self.tokens[spelling]
            if token.lstrip:
                cut[-1] = (cut[-1][0].rstrip(), None)
            cut += [(spelling, token), (following.lstrip() if token.rstrip else following, None)]
        return cut


def any_of(texts: Iterable[str]) -> str:
    """A pattern for any of the texts, the longest first, that tries their common beginnings once:
    plain alternatives cost a text full of ``<`` one attempt for each of hundreds of tokens."""
    groups: dict[str, list[str]] = {}
    may_end = False
    for text in texts:
        may_end = may_end or not text
        if text:
            groups.setdefault(text[0], []).append(text)
    branches = []
    for group in groups.values():
        shared = os.path.commonprefix(group)  # noqa: RUF071 - of texts, not of paths
        branches.append(re.escape(shared) + any_of(text[len(shared) :] for text in group))
    return f"(?:{'|'.join(branches)}){'?' if may_end else ''}" if branches else ""


def private_characters(count: int, avoid: str = "") -> str:
    """Characters nobody can foresee, from a private plane, none of them in ``avoid``."""
    taken = set(avoid)
    drawn: list[str] = []
    while len(drawn) < count:
        character = chr(_PRIVATE_PLANE + secrets.randbelow(0xFFFE))
        if character not in taken:
            drawn.append(character)
    return "".join(drawn)
