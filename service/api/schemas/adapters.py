"""``/v1/load_lora_adapter`` and ``/v1/unload_lora_adapter``, as vLLM has them."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from service.api.schemas.sampling import Fields

Name = Annotated[str, Field(min_length=1, max_length=128)]


class LoadAdapterRequest(Fields):
    lora_name: Name
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]
    load_inplace: bool | None = None
    strict: bool | None = None


class UnloadAdapterRequest(Fields):
    lora_name: Name
    lora_int_id: int | None = None
    strict: bool | None = None
