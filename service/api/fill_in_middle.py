"""``suffix``: what stands between two texts, for models that have tokens to ask for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from service.errors import InvalidRequest

if TYPE_CHECKING:
    from model.tokenizer import Tokenizer

LEAST_SHARE = 4  # a suffix that must be cut keeps at least this part (1 / so much) of the room


@dataclass(frozen=True, slots=True)
class Spelling:
    """How a family of models writes it: its tokens, and those that end what is filled in.

    Some put the suffix first (``[SUFFIX]suffix[PREFIX]prefix``) and have no token for the middle.
    """

    prefix: str
    suffix: str
    middle: str = ""
    ends: tuple[str, ...] = ()
    suffix_first: bool = False


SPELLINGS = (
    Spelling("▁<PRE>", "▁<SUF>", "▁<MID>", ("▁<EOT>",)),  # Code Llama
    Spelling(  # Qwen2.5-Coder, CodeGemma
        "<|fim_prefix|>",
        "<|fim_suffix|>",
        "<|fim_middle|>",
        ("<|fim_pad|>", "<|file_sep|>", "<|repo_name|>", "<|file_separator|>"),
    ),
    Spelling("<fim_prefix>", "<fim_suffix>", "<fim_middle>", ("<fim_pad>", "<file_sep>")),
    Spelling("<fim-prefix>", "<fim-suffix>", "<fim-middle>", ("<fim-pad>",)),  # SantaCoder
    Spelling("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    Spelling("[PREFIX]", "[SUFFIX]", suffix_first=True),  # Codestral
)
# A text is encoded behind this, whose tokens are then taken away, so that sentencepiece puts no
# space before what does not begin a text.
ANCHOR = "☺"


@dataclass(frozen=True, slots=True)
class FillInMiddle:
    """The same in a vocabulary's ids."""

    prefix: int
    suffix: int
    middle: int | None
    ends: tuple[int, ...]
    suffix_first: bool

    def prompt(
        self, before: list[int], after: list[int], begin: list[int], length: int | None
    ) -> list[int]:
        """Both texts with the tokens around them; ``begin`` stands before all.

        ``length``: how many tokens it may have. The prefix then keeps its end and the suffix its
        beginning: what is next to the gap.
        """
        if length is not None:
            before, after = self._cut(before, after, length - len(begin))
        middle = [] if self.middle is None else [self.middle]
        if self.suffix_first:
            return [*begin, self.suffix, *after, self.prefix, *before, *middle]
        return [*begin, self.prefix, *before, self.suffix, *after, *middle]

    def _cut(self, before: list[int], after: list[int], length: int) -> tuple[list[int], list[int]]:
        room = length - 2 - (self.middle is not None)
        if room < 1:
            raise InvalidRequest(
                f"truncate_prompt_tokens: leaves {room} tokens for prompt and suffix",
                param="truncate_prompt_tokens",
            )
        if len(before) + len(after) <= room:
            return before, after
        kept_after = min(len(after), max(room // LEAST_SHARE, room - len(before)))
        kept_before = room - kept_after
        return before[len(before) - min(len(before), kept_before) :], after[:kept_after]


def fill_in_middle(tokenizer: Tokenizer) -> FillInMiddle:
    """Raises ``InvalidRequest`` where the vocabulary has no such tokens."""
    for spelling in SPELLINGS:
        prefix, suffix = (
            tokenizer.token_to_id(spelling.prefix),
            tokenizer.token_to_id(spelling.suffix),
        )
        middle = tokenizer.token_to_id(spelling.middle) if spelling.middle else None
        if prefix is None or suffix is None or (spelling.middle and middle is None):
            continue
        ends = tuple(
            token for text in spelling.ends if (token := tokenizer.token_to_id(text)) is not None
        )
        return FillInMiddle(prefix, suffix, middle, ends, spelling.suffix_first)
    raise InvalidRequest(
        "suffix: this model has no fill-in-the-middle tokens; leave the field out.", param="suffix"
    )


def encode_inside(text: str, tokenizer: Tokenizer, *, parse: bool) -> list[int]:
    """The ids of a text that begins in the middle of another."""
    if not tokenizer.drops_first_space:
        return tokenizer.encode(text, add_special_tokens=False, parse_special=parse)
    anchor = tokenizer.encode(ANCHOR, add_special_tokens=False, parse_special=False)
    ids = tokenizer.encode(ANCHOR + text, add_special_tokens=False, parse_special=parse)
    if ids[: len(anchor)] == anchor:
        return ids[len(anchor) :]
    return tokenizer.encode(text, add_special_tokens=False, parse_special=parse)
