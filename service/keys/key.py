"""One key as the server knows it: its hash, its holder's rights, and what it may use."""

from __future__ import annotations

import hashlib
import re
import secrets
from datetime import datetime
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

PREFIX = "pronk-"  # lets scanners of repositories and logs find keys that leaked
ENTROPY = 32  # bytes: nothing a hash without salt and stretching would have to protect
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # a label, and a word on a command line
ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
MOST = 1 << 53

Count = Annotated[int, Field(ge=1, le=MOST)]


class Key(BaseModel):
    """``id`` names its books and its cached prefixes: it stays where the key is rotated."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, hide_input_in_errors=True)

    name: str
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", repr=False)
    id: str = ""
    admin: bool = False
    models: frozenset[str] | None = Field(default=None, min_length=1)  # and adapters; None: all
    requests_per_minute: Count | None = None
    tokens_per_minute: Count | None = None
    max_concurrency: Count | None = None
    tokens_per_day: Count | None = None
    tokens_per_month: Count | None = None
    weight: float = Field(default=1.0, gt=0, le=1000, allow_inf_nan=False)
    expires: datetime | None = None
    disabled: bool = False

    @field_validator("sha256")
    @classmethod
    def is_no_example(cls, value: str) -> str:
        if value == hash_of(""):
            raise ValueError("is the hash of nothing")
        return value

    @field_validator("name")
    @classmethod
    def is_name(cls, value: str) -> str:
        if not NAME.fullmatch(value) and not value.startswith("("):
            raise ValueError("takes 1 to 64 letters, digits, dots, dashes and underscores")
        return value

    @field_validator("id")
    @classmethod
    def is_id(cls, value: str) -> str:
        if value and not ID.fullmatch(value):
            raise ValueError("takes 1 to 64 letters, digits, dots, dashes and underscores")
        return value

    @field_validator("models", mode="before")
    @classmethod
    def read_models(cls, value: Any) -> Any:
        if isinstance(value, list) and value and all(isinstance(name, str) for name in value):
            return frozenset(value)
        if value is None or isinstance(value, frozenset):
            return value
        raise ValueError("is a list of one or more names")

    @field_validator("expires")
    @classmethod
    def has_zone(cls, value: datetime | None) -> datetime | None:
        if value is not None and value.tzinfo is None:
            raise ValueError("needs a time zone, e.g. 2030-01-31T00:00:00Z")
        return value

    def model_post_init(self, context: Any) -> None:
        if not self.id:
            object.__setattr__(self, "id", self.sha256[:16])

    @property
    def digest(self) -> bytes:
        return bytes.fromhex(self.sha256)

    def is_expired(self, now: float) -> bool:
        """``now``: seconds since the epoch."""
        return self.expires is not None and now >= self.expires.timestamp()


def hash_of(key: str) -> str:
    """What is kept of a key. Fast on purpose: a key of 256 random bits is not guessed."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def new_key() -> str:
    return PREFIX + secrets.token_urlsafe(ENTROPY)


def new_id() -> str:
    return "key_" + secrets.token_hex(8)
