"""Special tokens as text: which spellings are guarded, finding them, and spelling them privately.

A guarded spelling becomes its token only where the caller means it (a completion prompt, what a
chat template itself writes), never in a chat's contents. To encode a text that holds both, the
meant ones are written in a private spelling that no client can guess, so that one call of the
library encodes the whole text and treats the borders between tokens and text exactly as the
checkpoint does.
"""

from __future__ import annotations

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
        longest_first = sorted(self.tokens, key=len, reverse=True)
        pattern = "|".join(self._matching(self.tokens[text]) for text in longest_first)
        self.pattern = re.compile(f"({pattern})" if pattern else "(?!)()")
        secret = private_characters(3)
        self.private = {
            text: f"{secret}{token.id:x}{secret[0]}" for text, token in self.tokens.items()
        }

    def split(self, text: str) -> list[tuple[str, AddedToken | None]]:
        """The text cut at every spelling; runs of text carry None and may be empty."""
        runs: list[tuple[str, AddedToken | None]] = []
        for number, run in enumerate(self.pattern.split(text)):
            if number % 2:
                token = self.tokens.get(run) or self.tokens[run.strip()]
                runs.append((token.text, token))
            else:
                runs.append((run, None))
        return runs

    @staticmethod
    def _matching(token: AddedToken) -> str:
        """A token that strips takes the blanks beside it along, as the tokenizers library does."""
        before = r"\s*" if token.lstrip else ""
        after = r"\s*" if token.rstrip else ""
        word = (r"(?<!\w)", r"(?!\w)") if token.single_word else ("", "")
        return f"{before}{word[0]}{re.escape(token.text)}{word[1]}{after}"


def private_characters(count: int, avoid: str = "") -> str:
    """Characters nobody can foresee, from a private plane, none of them in ``avoid``."""
    taken = set(avoid)
    drawn: list[str] = []
    while len(drawn) < count:
        character = chr(_PRIVATE_PLANE + secrets.randbelow(0xFFFE))
        if character not in taken:
            drawn.append(character)
    return "".join(drawn)
