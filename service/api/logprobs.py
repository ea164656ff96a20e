"""Log-probabilities as the wire shows them: completions' parallel lists, chat's records."""

from __future__ import annotations

from typing import TYPE_CHECKING

from service.api.schemas.answers import PromptLogprob
from service.api.schemas.chat import ChatLogprobs, ChatTokenLogprob, TopLogprob
from service.api.schemas.completions import CompletionLogprobs
from service.api.text import TokenNews
from service.engine.messages import TokenLogprob

if TYPE_CHECKING:
    from model.tokenizer import Tokenizer

LEAST = -9999.0  # JSON has no -Infinity; vLLM says the same


def finite(logprob: float) -> float:
    return max(logprob, LEAST)


def alternatives(logprob: TokenLogprob, most: int) -> list[tuple[int, float]]:
    """The ``most`` likeliest tokens with their log-probabilities, likeliest first."""
    return list(zip(logprob.top_ids, logprob.top_logprobs, strict=True))[:most]


class LogprobWriter:
    """``as_ids``: tokens are named ``token_id:123``, as ``return_tokens_as_token_ids`` asks.
    ``most``: alternatives shown, where the engine was asked for more than one field wants."""

    def __init__(self, tokenizer: Tokenizer, *, as_ids: bool = False, most: int = 0) -> None:
        self._tokenizer = tokenizer
        self._as_ids = as_ids
        self._most = most

    def name(self, token: int) -> str:
        return f"token_id:{token}" if self._as_ids else self._tokenizer.token_text(token)

    def completion(self, news: list[TokenNews]) -> CompletionLogprobs:
        return CompletionLogprobs(
            text_offset=[item.offset for item in news],
            token_logprobs=[
                finite(item.logprob.logprob) if item.logprob else None for item in news
            ],
            tokens=[self.name(item.token) for item in news],
            top_logprobs=[self._top(item) for item in news],
        )

    def _top(self, item: TokenNews) -> dict[str, float] | None:
        """The alternatives and always the token itself. Two tokens of one spelling share a key,
        where the likelier stands."""
        if item.logprob is None:
            return None
        top = {self.name(item.token): finite(item.logprob.logprob)}
        for token, logprob in alternatives(item.logprob, self._most):
            name = self.name(token)
            top[name] = max(finite(logprob), top.get(name, LEAST))
        return top

    def chat(self, news: list[TokenNews]) -> ChatLogprobs:
        return ChatLogprobs([self._record(item) for item in news if item.logprob is not None])

    def _record(self, item: TokenNews) -> ChatTokenLogprob:
        assert item.logprob is not None
        return ChatTokenLogprob(
            self.name(item.token),
            finite(item.logprob.logprob),
            self._bytes(item.token),
            [
                TopLogprob(self.name(token), finite(logprob), self._bytes(token))
                for token, logprob in alternatives(item.logprob, self._most)
            ],
        )

    def _bytes(self, token: int) -> list[int]:
        return list(self._tokenizer.token_bytes(token))

    def prompt(
        self, ids: list[int], logprobs: list[TokenLogprob | None], most: int
    ) -> list[dict[str, PromptLogprob] | None]:
        """``[null, {"id": {...}}, ...]``: the prompt's token and its alternatives by id."""
        return [
            None if logprob is None else self._prompt_entry(token, logprob, most)
            for token, logprob in zip(ids, logprobs, strict=True)
        ]

    def _prompt_entry(
        self, token: int, logprob: TokenLogprob, most: int
    ) -> dict[str, PromptLogprob]:
        entry = {
            str(other): PromptLogprob(finite(value), rank, self._tokenizer.token_text(other))
            for rank, (other, value) in enumerate(alternatives(logprob, most), start=1)
        }
        entry[str(token)] = PromptLogprob(
            finite(logprob.logprob), logprob.rank, self._tokenizer.token_text(token)
        )
        return entry
