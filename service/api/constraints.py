"""What an answer's text must be, as a grammar the engine compiles (llguidance's JSON)."""

from __future__ import annotations

import json
from typing import Any

COMPACT = {"whitespace_flexible": False, "item_separator": ",", "key_separator": ":"}


def json_schema_grammar(schema: dict[str, Any]) -> str:
    """JSON that satisfies ``schema``, without free white space: a weak model would go on blank.

    Whether the schema is a good one is found out by whoever compiles it.
    """
    return json.dumps({"grammars": [{"json_schema": {**schema, "x-guidance": COMPACT}}]})
