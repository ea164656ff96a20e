"""The JSON schemas that answers are held to where they have to call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from service.api.json_schemas import moved
from service.api.schemas.tools import Tool

NO_PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {},
    "additionalProperties": False,
}
COMBINING = {"allOf", "anyOf", "oneOf", "$ref", "patternProperties", "if", "unevaluatedProperties"}


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
