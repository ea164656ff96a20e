"""Marks in what a client sent, so that no special spelling in it survives a render."""

from __future__ import annotations

import re
from collections.abc import Iterable

from model.tokenizer import Tokenizer
from model.tokenizer.special import AddedToken, any_of


class Marked:
    """A rendered text with the marks still in it."""

    def __init__(self, marked: str, mark: str) -> None:
        self.marked, self.mark = marked, mark

    def text(self) -> str:
        return self.marked.replace(self.mark, "")


class Marker:
    """Puts a mark behind the first character of special spellings, or of what could become one."""

    def __init__(self, tokenizer: Tokenizer, *, eager: bool) -> None:
        tokens = list(tokenizer.spellings.tokens.values())
        self._all = _starts(tokens, eager)
        self._special = _starts([token for token in tokens if token.special], eager)
        self._eager = eager
        self._prefixes = {token.text[:n] for token in tokens for n in range(1, len(token.text))}
        self._longest = max(map(len, self._prefixes), default=0)

    def mark(self, text: str, mark: str, by_assistant: bool) -> str:
        """``by_assistant``: markup that is not special is left readable, unless eager."""
        pattern = self._special if by_assistant and not self._eager else self._all
        text = pattern.sub(lambda found: found[0] + mark, text)
        return text if self._eager else self._mark_end(text, mark)

    def would_mark(self, text: str) -> bool:
        return self._all.search(text) is not None

    def _mark_end(self, text: str, mark: str) -> str:
        """Half a spelling at the end: the next thing a template writes could complete it."""
        end = len(text.rstrip())
        for size in range(min(self._longest, end), 0, -1):
            if text[end - size : end] in self._prefixes:
                return text[: end - size + 1] + mark + text[end - size + 1 :]
        return text


def _starts(tokens: Iterable[AddedToken], eager: bool) -> re.Pattern[str]:
    """Finds first characters: any that is punctuation when eager, else those of whole spellings."""
    rests: dict[str, list[str]] = {}
    for token in tokens:
        rests.setdefault(token.text[0], []).append(token.text[1:])
    alternatives = (_start(first, any_of(rest), eager) for first, rest in rests.items())
    return re.compile("|".join(alternatives) or "(?!)")


def _start(first: str, rest: str, eager: bool) -> str:
    is_punctuation = not (first.isalnum() or first.isspace())
    return re.escape(first) if eager and is_punctuation else f"{re.escape(first)}(?={rest})"
