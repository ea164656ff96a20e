"""Parts that the answers of completions and chat share."""

from __future__ import annotations

from msgspec import Struct

from service.redaction import Redacted


class PromptTokensDetails(Struct):
    cached_tokens: int = 0


class CompletionTokensDetails(Struct):
    reasoning_tokens: int = 0
    accepted_prediction_tokens: int = 0  # guessed ahead, and said
    rejected_prediction_tokens: int = 0  # guessed in vain


class Usage(Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class PromptLogprob(Redacted, Struct):
    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None] | None


def usage(
    prompt_tokens: int,
    completion_tokens: int,
    cached_tokens: int,
    num_accepted: int = 0,
    num_rejected: int = 0,
) -> Usage:
    return Usage(
        prompt_tokens,
        completion_tokens,
        prompt_tokens + completion_tokens,
        PromptTokensDetails(cached_tokens),
        CompletionTokensDetails(
            accepted_prediction_tokens=num_accepted, rejected_prediction_tokens=num_rejected
        ),
    )
