"""JSON schemas rewritten: keywords in them told from the names and data that look like keywords."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

DATA = {"const", "enum", "default", "example", "examples"}  # keywords that hold no schemas
MAPS = {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"}
LEFT_OUT = object()

# What llguidance can follow; any other format is an annotation, as the specification has it.
FORMATS = {"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uri"}
FORMATS |= {"uuid", "unknown"}


def rewritten(schema: Any, change: Callable[[str, Any], Any], *, is_map: bool = False) -> Any:
    """A copy in which each keyword's value is what ``change(keyword, value)`` says.

    ``is_map``: names to schemas, so that a key is a name and no keyword.
    """
    if isinstance(schema, list):
        return [rewritten(item, change) for item in schema]
    if not isinstance(schema, dict):
        return schema
    copy: dict[str, Any] = {}
    for key, value in schema.items():
        if is_map:
            copy[key] = rewritten(value, change)
        elif (new := change(key, value)) is not LEFT_OUT:
            kept = key in DATA or new is not value
            copy[key] = new if kept else rewritten(value, change, is_map=key in MAPS)
    return copy


def without_annotations(schema: dict[str, Any]) -> dict[str, Any]:
    """Without the formats that nothing can be held to."""

    def change(key: str, value: Any) -> Any:
        is_annotation = key == "format" and isinstance(value, str) and value not in FORMATS
        return LEFT_OUT if is_annotation else value

    plain: dict[str, Any] = rewritten(schema, change)
    return plain


def moved(schema: Any, root: str) -> Any:
    """A schema whose references to places in itself go to ``root``, where it lies from now on."""

    def change(key: str, value: Any) -> Any:
        is_reference = key == "$ref" and isinstance(value, str) and value.startswith("#")
        return root + value[1:] if is_reference else value

    return rewritten(schema, change)
