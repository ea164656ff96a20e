"""Token ids to text, as they come: holds the bytes of an unfinished character back, loses none."""

from __future__ import annotations

import codecs
from collections.abc import Collection, Sequence

from model.tokenizer import Tokenizer


class Detokenizer:
    """Pushed token by token it gives the text of the whole: the tokens' bytes joined and decoded as
    UTF-8 with replacement, in constant time a token however long the text grows.

    A continuation keeps the space it begins with. Only where nothing but special tokens comes
    before it does its first token begin a text, and lose the space that encoding puts there.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        prompt_ids: Sequence[int] = (),
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
        shown_special: Collection[int] = (),
    ) -> None:
        """``shown_special`` are not skipped, whatever ``skip_special_tokens`` says.

        ``spaces_between_special_tokens`` asks for what vLLM gives with fast tokenizers, where it
        changes nothing: a byte-true decoder puts no spaces anywhere, so there are none to take out.
        """
        self._tokenizer = tokenizer
        self._skips_special = skip_special_tokens
        self._shown_special = shown_special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        begins_text = all(map(tokenizer.is_special, prompt_ids))
        self._at_start = tokenizer.drops_first_space and begins_text

    def push(self, token: int) -> str:
        """The text that is certain now; empty while a character is unfinished."""
        if self._tokenizer.is_special(token):
            is_skipped = self._skips_special and token not in self._shown_special
            return "" if is_skipped else self._decoder.decode(self._tokenizer.token_bytes(token))
        if self._at_start:
            self._at_start = False
            return self._decoder.decode(self._tokenizer.first_bytes(token))
        return self._decoder.decode(self._tokenizer.token_bytes(token))

    def flush(self) -> str:
        """What was held back, replaced where it is no character; call it once, at the end."""
        return self._decoder.decode(b"", final=True)
