"""The fields that completions and chat share, with their types and fixed bounds.

Bounds that depend on the server's settings or on the model's vocabulary are checked where those are
known (``service/api/sampling.py``). ``null`` means absent in every field.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from service.redaction import Redacted

INT64 = 1 << 63
MAX_STOP_LENGTH = 4096  # characters
MAX_BAD_WORD_LENGTH = 256  # characters; each word is tokenized twice


class Fields(Redacted, BaseModel):
    """Strict types; unknown fields are kept aside, so that they can be named in the answer."""

    model_config = ConfigDict(
        extra="allow",
        strict=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        hide_input_in_errors=True,
    )


class StreamOptions(Fields):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Speculation(Fields):
    method: Literal["none", "ngram", "draft"] | None = None
    num_tokens: Annotated[int, Field(ge=0)] | None = None


class JsonSchema(Fields):
    """``strict`` changes nothing: what is generated always satisfies the schema."""

    name: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[a-zA-Z0-9_-]+$")]
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Fields):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Fields):
    """Exactly one; a schema may also come as its JSON text."""

    json_: dict[str, Any] | str | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool | None = None  # there is none anyway


def _one_or_many(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


TokenIds = list[Annotated[int, Field(ge=0)]]
Bias = Annotated[float, Field(ge=-100, le=100)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
BadWord = Annotated[str, Field(min_length=1, max_length=MAX_BAD_WORD_LENGTH)]
STOP_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string", "minLength": 1}},
        {"type": "null"},
    ]
}
Stop = Annotated[
    list[StopString] | None, BeforeValidator(_one_or_many), WithJsonSchema(STOP_SCHEMA)
]
Logprobs = Annotated[int, Field(ge=0, le=20)]


class SamplingFields(Fields):
    """Also the fields known but not served yet: they are refused by name, never ignored."""

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=0, lt=INT64)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=INT64)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    prompt_logprobs: Logprobs | None = None
    echo: bool | None = None
    stop: Stop = None
    include_stop_str_in_output: bool | None = None
    stop_token_ids: TokenIds | None = None
    allowed_token_ids: Annotated[TokenIds, Field(min_length=1)] | None = None
    logit_bias: dict[str, Bias] | None = None
    bad_words: Annotated[list[BadWord], Field(max_length=128)] | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=INT64)] | None = None
    ignore_eos: bool | None = None
    seed: Annotated[int, Field(ge=-INT64, lt=INT64)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: str | None = None

    priority: Annotated[int, Field(ge=-INT64, lt=INT64)] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, lt=INT64)] | None = None
    truncation_side: Literal["left", "right"] | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    response_format: ResponseFormat | None = None
    deadline_ms: Annotated[int, Field(gt=0, lt=INT64)] | None = None
    max_queue_ms: Annotated[int, Field(gt=0, lt=INT64)] | None = None
    speculation: Speculation | None = None
    strict: bool | None = None

    best_of: Annotated[int, Field(ge=1)] | None = None
    use_beam_search: bool | None = None
    length_penalty: Annotated[float, Field(ge=-50, le=50)] | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
