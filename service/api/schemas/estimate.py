"""``POST /v1/estimate``: what a request would cost."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct


class AdmissionRefusal(Struct):
    """As the error would say it."""

    message: str
    code: str | None
    retry_after: float | None = None


class Estimate(Struct, kw_only=True):
    """Seconds are null where the request would not be admitted, tokens where they do not fit."""

    object: Literal["estimate"] = "estimate"
    model: str
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    max_new_tokens: int | None = None
    max_model_len: int
    fits_context: bool = True
    queue_seconds: float | None = None
    prefill_seconds: float | None = None
    decode_seconds: float | None = None
    total_seconds: float | None = None
    would_be_admitted: bool = True
    reason: AdmissionRefusal | None = None
