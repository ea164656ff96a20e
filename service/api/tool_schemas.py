"""The JSON schemas that answers are held to where they have to call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from service.api.schemas.tools import Tool

NO_PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {},
    "additionalProperties": False,
}
COMBINING = {"allOf", "anyOf", "oneOf", "$ref", "patternProperties", "if", "unevaluatedProperties"}
DATA_KEYS = {"const", "enum", "default", "example", "examples"}  # of a schema: hold no schemas
MAPS = {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"}


def calls_schema(tools: Sequence[Tool], *, is_parallel: bool) -> dict[str, Any]:
    """``[{"name": ..., "parameters": ...}, ...]``; each function's schema lies under its name in
    ``$defs``, with the references in it going there."""
    call = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool.function.name},
                "parameters": {"$ref": f"#/$defs/{tool.function.name}"},
            },
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    definitions = {
        tool.function.name: moved(parameters_of(tool), f"#/$defs/{tool.function.name}")
        for tool in tools
    }
    bounds = {"minItems": 1} if is_parallel else {"minItems": 1, "maxItems": 1}
    return {"type": "array", "items": {"anyOf": call}, "$defs": definitions} | bounds


def parameters_of(tool: Tool) -> dict[str, Any]:
    """An object's schema. Properties that none names are left out where that can be said at its
    root: a weak model would go on inventing them."""
    given = tool.function.parameters
    if not given:
        return NO_PARAMETERS
    schema = {"type": "object"} | {
        key: value for key, value in given.items() if key not in ("$schema", "$id")
    }
    if "properties" in schema and not COMBINING & schema.keys():
        schema.setdefault("additionalProperties", False)
    return schema


def moved(schema: Any, root: str, *, is_map: bool = False) -> Any:
    """A schema whose references to places in itself go to ``root``, where it lies from now on.

    ``is_map``: names to schemas, so that a key is a name and no keyword.
    """
    if isinstance(schema, list):
        return [moved(item, root) for item in schema]
    if not isinstance(schema, dict):
        return schema
    copy: dict[str, Any] = {}
    for key, value in schema.items():
        if not is_map and key == "$ref" and isinstance(value, str) and value.startswith("#"):
            copy[key] = root + value[1:]
        elif not is_map and key in DATA_KEYS:
            copy[key] = value
        else:
            is_names = not is_map and key in MAPS
            copy[key] = moved(value, root, is_map=is_names)
    return copy
