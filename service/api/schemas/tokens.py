"""``/tokenize`` and ``/detokenize``."""

from __future__ import annotations

from typing import Annotated

from msgspec import UNSET, Struct, UnsetType
from pydantic import Field

from service.api.schemas.chat import Message, TemplateFields
from service.api.schemas.sampling import Fields, TokenIds
from service.redaction import Redacted


class TokenizeRequest(TemplateFields):
    """Either ``prompt`` or ``messages``."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    parse_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    strict: bool | None = None


class DetokenizeRequest(Fields):
    model: str | None = None
    tokens: TokenIds
    strict: bool | None = None


class Tokenized(Redacted, Struct):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | UnsetType = UNSET


class Detokenized(Redacted, Struct):
    prompt: str
