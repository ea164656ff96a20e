"""``POST /v1/completions``: its request and its answers, whole and streamed."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import UNSET, Struct, UnsetType
from pydantic import BeforeValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from service.api.schemas.answers import PromptLogprobs, Usage
from service.api.schemas.sampling import Logprobs, SamplingFields
from service.redaction import Redacted


def _refuse(message: str) -> PydanticCustomError:
    return PydanticCustomError("prompt", "{reason}", {"reason": message})


def _is_ids(values: list[Any]) -> bool:
    return all(type(value) is int for value in values)


def read_prompts(value: Any) -> list[str] | list[list[int]] | None:
    """A string, strings, token ids or id lists, as a list of prompts. Raises on anything else."""
    if value is None:
        return None
    prompts = [value] if isinstance(value, str) else value
    if not isinstance(prompts, list):
        raise _refuse("must be a string, a list of strings, token ids or lists of token ids")
    if prompts and _is_ids(prompts):
        prompts = [prompts]
    if not prompts or any(prompt == "" or prompt == [] for prompt in prompts):
        raise _refuse("must not be empty")
    is_text = all(isinstance(prompt, str) for prompt in prompts)
    if not is_text and not all(isinstance(prompt, list) and _is_ids(prompt) for prompt in prompts):
        raise _refuse("must be a string, a list of strings, token ids or lists of token ids")
    return prompts


PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}},
        {"type": "array", "items": {"type": "integer"}},
        {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
    ]
}
Prompts = Annotated[Any, BeforeValidator(read_prompts), WithJsonSchema(PROMPT_SCHEMA)]


class CompletionRequest(SamplingFields):
    prompt: Prompts = None
    logprobs: Logprobs | None = None
    suffix: str | None = None
    parse_special_tokens: bool | None = None


class CompletionLogprobs(Redacted, Struct):
    """Parallel lists, as OpenAI's legacy answer has them; offsets are characters of the text."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class CompletionChoice(Redacted, Struct):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Literal["stop", "length", "content_filter"] | None = None
    stop_reason: int | str | None = None
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET


class Completion(Redacted, Struct, kw_only=True):
    """Also a stream's chunk: ``usage`` is then absent, null or running, as the options ask."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET
