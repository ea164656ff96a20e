"""A tiny text grammar: `[a|b|c]` chooses, `{name}` fills in, both may nest."""

from __future__ import annotations

import random
import re

Slots = dict[str, str]

_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_SLOT = re.compile(r"\{(\w+)\}")


def expand(template: str, rng: random.Random, slots: Slots) -> str:
    """Choices are taken innermost first; a slot's text is final and is not expanded again.

    `{Name}` is the slot `name` with its first letter raised.
    """
    while match := _CHOICE.search(template):
        chosen = rng.choice(match[1].split("|"))
        template = template[: match.start()] + chosen + template[match.end() :]
    return _SLOT.sub(lambda match: _fill(match[1], slots), template)


def read_templates(text: str) -> list[str]:
    """One template a paragraph; a line broken after `|` or `[` is joined without a space."""
    paragraphs = text.strip().split("\n\n")
    return [re.sub(r"(?<![|\[])\n", " ", one).replace("\n", "") for one in paragraphs]


def _fill(name: str, slots: Slots) -> str:
    if name in slots:
        return slots[name]
    return capitalise(slots[name[0].lower() + name[1:]])


def capitalise(text: str) -> str:
    return text[:1].upper() + text[1:]


def with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def items(text: str) -> list[str]:
    """What stands between commas, wherever the lines are broken."""
    return [item for part in text.split(",") if (item := " ".join(part.split()))]


def table(text: str) -> dict[str, str]:
    """`key: value` pairs between semicolons."""
    pairs = (part.split(":") for part in text.split(";") if part.strip())
    return {" ".join(key.split()): " ".join(value.split()) for key, value in pairs}
