"""What a text must be, as which tokens may come next: llguidance's automata over our vocabularies.

A grammar is llguidance's JSON, ``{"grammars": [{"lark_grammar": ...}]}``. It is compiled once for a
vocabulary and then followed by one ``GrammarState`` a text. Nothing here knows a tensor: masks are
written to memory that the caller owns, one bit a token in 32-bit words.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from model.tokenizer import Tokenizer

LIMITS = LLParserLimits(
    step_lexer_fuel=100_000,  # some 7 ms of one mask; where it runs out, its own text fails
    step_max_items=10_000,  # the default took a second where long rules are ambiguous
    max_lexer_states=25_000,  # 1 to 2 kB each, in every text that follows the grammar
    verbose_errors=False,
)
MOST_TOLD = 300  # characters of the library's message
DEAD_END = "NoExtensionBias"  # the library's word for it


class GrammarError(ValueError):
    """No grammar, or none that can be followed; the text is one line for its author."""


class Vocabulary:
    """The tokens of a network's logits as bytes, and an end of our own behind the last of them.

    Special tokens and ends are never part of a text. The one end in the automata is ``end``, which
    no row of logits has: which of a model's tokens end a text is the request's affair, and where a
    text may end is known also for a model without such a token.
    """

    def __init__(self, tokens: Sequence[bytes], special: Sequence[int] = ()) -> None:
        self.size = len(tokens)
        self.end = len(tokens)
        self.num_words = -(-(self.size + 1) // 32)
        self.opening: bytes | None = None
        self._special: frozenset[int] = frozenset()
        described = _Tokens([*tokens, b"<end>"], self.end, [*special, self.end])
        self.tokenizer = LLTokenizer(described, eos_token=self.end)  # type: ignore[arg-type]

    @classmethod
    def of(cls, tokenizer: Tokenizer, width: int) -> Vocabulary:
        """``width`` tokens have logits: those past the tokenizer's vocabulary are never said."""
        ids = range(width)
        special = {token for token in ids if tokenizer.is_special(token)} | {
            token for token in tokenizer.eos_ids if token < width
        }
        made = cls([tokenizer.token_bytes(token) for token in ids], sorted(special))
        made._special = frozenset(special)
        if tokenizer.drops_first_space:
            made.opening = _as_bits(
                (tokenizer.first_bytes(token) == tokenizer.token_bytes(token) for token in ids),
                made.num_words,
            )
        return made

    def begins_text(self, prompt: Sequence[int]) -> bool:
        """Whether the token after ``prompt`` loses the space it may begin with."""
        return self.opening is not None and all(token in self._special for token in prompt)


def _as_bits(flags: Iterable[bool], num_words: int) -> bytes:
    """Bit i of the words is flag i; the one after the last, the end's, is set too."""
    packed = numpy.packbits([*flags, True], bitorder="little").tobytes()
    return packed.ljust(num_words * 4, b"\0")


class _Tokens:
    """As llguidance asks for a tokenizer: by attributes of these names."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokens: list[bytes], end: int, special: list[int]) -> None:
        self.tokens = tokens
        self.eos_token_id = end
        self.special_token_ids = special

    def __call__(self, text: str) -> list[int]:
        raise AssertionError("grammars are compiled with no_forcing: nothing is tokenized")


class Grammar:
    """A compiled grammar: what every text that follows it starts from."""

    def __init__(self, text: str, vocabulary: Vocabulary) -> None:
        """Takes milliseconds, seconds if it is meant to; leaves the interpreter lock meanwhile.

        Raises GrammarError.
        """
        self.vocabulary = vocabulary
        self._matcher = LLMatcher(vocabulary.tokenizer, text, log_level=0, limits=LIMITS)
        if self._matcher.is_error():
            raise GrammarError(cleaned(self._matcher.get_error()))
        first = numpy.frombuffer(self._matcher.compute_bitmask(), dtype="uint32").copy()
        if self._matcher.is_error():
            raise GrammarError(cleaned(self._matcher.get_error()))
        first[vocabulary.end // 32] &= ~(numpy.uint32(1) << numpy.uint32(vocabulary.end % 32))
        if not first.any():
            raise GrammarError("nothing but the empty text satisfies it")
        self._first = first.tobytes()

    def start(self, prompt: Sequence[int] = ()) -> GrammarState:
        """The state of a text that is to follow ``prompt``."""
        first, opening = self._first, self.vocabulary.opening
        if opening is not None and self.vocabulary.begins_text(prompt):
            first = bytes(a & b for a, b in zip(first, opening, strict=True))
        return GrammarState(self._matcher.deep_copy(), first)


class GrammarState:
    """One text on its way through a grammar. One thread at a time."""

    __slots__ = ("first", "matcher", "num_taken")

    def __init__(self, matcher: LLMatcher, first: bytes) -> None:
        self.matcher = matcher
        self.first = first  # the mask of its first token: known, and the same for many
        self.num_taken = 0  # tokens of the text so far

    def take(self, tokens: Sequence[int]) -> None:
        """The text goes on with these. Raises GrammarError where it cannot, or grew too complex."""
        if tokens and not self.matcher.consume_tokens(list(tokens)):
            raise GrammarError(cleaned(self.matcher.get_error()))
        self.num_taken += len(tokens)

    @property
    def is_complete(self) -> bool:
        """Whether the text is whole and nothing may follow."""
        return self.matcher.is_stopped() and not self.matcher.is_error()

    @property
    def may_end(self) -> bool:
        return self.matcher.is_accepting()

    def can_take(self, token: int) -> bool:
        """Whether it may go on with this token, as text."""
        return self.matcher.validate_tokens([token]) == 1

    def check(self) -> None:
        """Raises GrammarError where the last mask could not be computed within bounds."""
        if self.matcher.is_error():
            raise GrammarError(cleaned(self.matcher.get_error()))


_LISTING = re.compile(r"^\s*\d+ \|.*$|^\s*\^+\s*$")  # source lines and what points into them
_PLACE = re.compile(r"^at \d+\(\d+\): ")
_PREAMBLE = re.compile(r"^(?:failed to compile JSON schema|failed to parse \"%json\"): ")


def cleaned(message: str) -> str:
    """The library's message as one line: no listing of the grammar, no place in our wording."""
    lines = [line.strip() for line in message.splitlines() if not _LISTING.match(line)]
    text = _PREAMBLE.sub("", _PLACE.sub("", " ".join(filter(None, lines))))
    text = text.replace(" <non-verbose/>", "")
    text = re.sub(r"Enable 'coerce_one_of' option .*", "Write anyOf in its place.", text)
    if text == DEAD_END:
        return "no text satisfies it, or none that this model's tokens can spell"
    return text if len(text) <= MOST_TOLD else text[:MOST_TOLD] + "..."
