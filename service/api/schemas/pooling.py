"""Requests that ask of texts and generate none: embeddings, scores, rankings."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import UNSET, Struct, UnsetType
from pydantic import BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from service.api.schemas.completions import Prompts
from service.api.schemas.sampling import INT64, Fields
from service.redaction import Redacted

TEXTS_SCHEMA = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}


def read_texts(value: Any) -> list[str] | None:
    """One text or several, none empty."""
    texts = [value] if isinstance(value, str) else value
    is_list = isinstance(texts, list) and all(isinstance(text, str) for text in texts)
    if not is_list:
        raise _refused("must be a string or a list of strings")
    if not texts or not all(texts):
        raise _refused("must not be empty")
    return list(texts)


def read_documents(value: Any) -> list[str] | None:
    """Texts, or objects of which ``text`` counts."""
    if isinstance(value, list):
        value = [one.get("text") if isinstance(one, dict) else one for one in value]
    else:
        raise _refused("must be a list of strings or of objects with text")
    return read_texts(value)


def _refused(message: str) -> PydanticCustomError:
    return PydanticCustomError("texts", "{reason}", {"reason": message})


Texts = Annotated[Any, BeforeValidator(read_texts), WithJsonSchema(TEXTS_SCHEMA)]
DOCUMENT_SCHEMA = {
    "type": "array",
    "items": {
        "anyOf": [
            {"type": "string"},
            {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]},
        ]
    },
}
Documents = Annotated[Any, BeforeValidator(read_documents), WithJsonSchema(DOCUMENT_SCHEMA)]


class TextFields(Fields):
    """What all of them may say beside their texts."""

    model: str | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, lt=INT64)] | None = None
    truncation_side: Literal["left", "right"] | None = None
    add_special_tokens: bool | None = None
    parse_special_tokens: bool | None = None
    priority: Annotated[int, Field(ge=-INT64, lt=INT64)] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    user: str | None = None
    strict: bool | None = None


class EmbeddingRequest(TextFields):
    input: Prompts
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1, lt=INT64)] | None = None
    pooling: Literal["mean", "last"] | None = None


class ScoreRequest(TextFields):
    text_1: Texts
    text_2: Texts


class RerankRequest(TextFields):
    query: Annotated[str, Field(min_length=1)]
    documents: Documents
    top_n: Annotated[int, Field(ge=1, lt=INT64)] | None = None
    return_documents: bool | None = None


class TextUsage(Struct):
    prompt_tokens: int
    total_tokens: int


class Embedding(Redacted, Struct):
    """``embedding`` is a list of numbers, or float32 in little-endian order as base64."""

    index: int
    embedding: list[float] | str
    object: Literal["embedding"] = "embedding"


class EmbeddingList(Redacted, Struct, kw_only=True):
    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: TextUsage


class Score(Redacted, Struct):
    index: int
    score: float
    object: Literal["score"] = "score"


class ScoreList(Redacted, Struct, kw_only=True):
    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Score]
    usage: TextUsage


class RankedDocument(Redacted, Struct):
    text: str


class Ranked(Redacted, Struct):
    index: int
    relevance_score: float
    document: RankedDocument | UnsetType = UNSET


class Ranking(Redacted, Struct, kw_only=True):
    id: str
    model: str
    results: list[Ranked]
    usage: TextUsage
