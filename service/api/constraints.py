"""What an answer's text must be, from a request's fields to a grammar the engine compiles.

The grammar is llguidance's JSON (or GBNF, which the engine translates). Sizes are bounded here;
whether it is a good one, and whether it can be compiled in time, the engine finds out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from service.api.json_schemas import without_annotations
from service.api.schemas.sampling import SamplingFields
from service.errors import InvalidRequest
from service.redaction import redacted

COMPACT = {"whitespace_flexible": False, "item_separator": ",", "key_separator": ":"}
HEADER = {"no_forcing": True}  # any spelling of a text in tokens is right
MAX_SCHEMA = 128 << 10  # characters
MAX_GRAMMAR = 64 << 10
MAX_REGEX = 16 << 10
MAX_CHOICES = 1000
MAX_CHOICES_TEXT = 64 << 10
MAX_DEPTH = 64

_GBNF = re.compile(r"^\s*root\s*::=", re.MULTILINE)
_HEADER = re.compile(r"^\s*%llguidance\b(.*)$", re.MULTILINE)


class Constraint(NamedTuple):
    """``param`` is the field an error names."""

    param: str
    grammar: str

    def __repr__(self) -> str:
        return redacted(self, ("param",))


def read_constraint(fields: SamplingFields) -> Constraint | None:
    """The one a request names, if any. Raises ``InvalidRequest``, also for more than one."""
    found = list(_sources(fields))
    if len(found) > 1:
        names = " and ".join(source.param for source in found[:2])
        raise InvalidRequest(
            f"{names}: only one of them can say what the answer must be", param=found[1].param
        )
    return Constraint(found[0].param, found[0].read(found[0])) if found else None


class _Source(NamedTuple):
    param: str
    value: Any
    read: Callable[[_Source], str]

    def __repr__(self) -> str:
        return redacted(self, ("param",))

    def refuse(self, reason: str) -> InvalidRequest:
        return InvalidRequest(f"{self.param}: {reason}", param=self.param)


def _sources(fields: SamplingFields) -> Iterator[_Source]:
    wanted = fields.response_format
    if wanted is not None and wanted.type == "json_object":
        yield _Source("response_format", {"type": "object"}, _schema)
    elif wanted is not None and wanted.type == "json_schema":
        if wanted.json_schema is None:
            raise InvalidRequest(
                "response_format.json_schema: is required with this type",
                param="response_format.json_schema",
            )
        schema = wanted.json_schema.schema_
        schema = {"type": "object"} if schema is None else schema
        yield _Source("response_format.json_schema.schema", schema, _schema)
    yield from _structured_outputs(fields)
    for name, read in _READERS.items():
        if (value := getattr(fields, f"guided_{name}", None)) is not None:
            yield _Source(f"guided_{name}", value, read)


def _structured_outputs(fields: SamplingFields) -> Iterator[_Source]:
    outputs = fields.structured_outputs
    if outputs is None:
        return
    values = {"json": outputs.json_, "regex": outputs.regex, "choice": outputs.choice}
    values["grammar"] = outputs.grammar
    found = [
        _Source(f"structured_outputs.{name}", value, _READERS[name])
        for name, value in values.items()
        if value is not None
    ]
    if outputs.json_object:
        found.append(_Source("structured_outputs.json_object", {"type": "object"}, _schema))
    if len(found) != 1:
        raise InvalidRequest(
            "structured_outputs: takes exactly one of json, regex, choice, grammar, json_object",
            param="structured_outputs",
        )
    yield from found


def json_schema_grammar(schema: dict[str, Any]) -> str:
    """JSON that satisfies ``schema``, without free white space: a weak model would go on blank.

    Whether the schema is a good one is found out by whoever compiles it.
    """
    return _lark(
        "start: %json " + json.dumps({**without_annotations(schema), "x-guidance": COMPACT})
    )


def _lark(rules: str, options: dict[str, Any] | None = None) -> str:
    header = json.dumps({**(options or {}), **HEADER})
    return json.dumps({"grammars": [{"lark_grammar": f"%llguidance {header}\n{rules}"}]})


def _schema(source: _Source) -> str:
    schema = source.value
    if isinstance(schema, str):
        if len(schema) > MAX_SCHEMA:
            raise source.refuse(f"takes at most {MAX_SCHEMA} characters")
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise source.refuse(f"is no JSON: {error}") from None
    if not isinstance(schema, dict):
        raise source.refuse("must be a JSON schema: an object")
    if _depth(schema) > MAX_DEPTH:
        raise source.refuse(f"is nested more than {MAX_DEPTH} deep")
    grammar = json_schema_grammar(schema)
    if len(grammar) > MAX_SCHEMA:
        raise source.refuse(f"takes at most {MAX_SCHEMA} characters")
    return grammar


def _depth(value: Any) -> int:
    """Of objects and arrays, level by level: no recursion to run out of."""
    depth, level = 0, [value]
    while level := [inner for one in level for inner in _inside(one)]:
        depth += 1
    return depth


def _inside(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _regex(source: _Source) -> str:
    if len(source.value) > MAX_REGEX:
        raise source.refuse(f"takes at most {MAX_REGEX} characters")
    return _lark(f"start: /{_escape_slashes(source.value)}/")


def _escape_slashes(regex: str) -> str:
    """As Lark writes a pattern: between slashes, on one line."""
    escaped = re.sub(r"\\(.)|/", lambda found: found[0] if found[1] else r"\/", regex, flags=re.S)
    return escaped.replace("\\\n", r"\n").replace("\n", r"\n").replace("\r", r"\r")


def _choice(source: _Source) -> str:
    choices = source.value
    if not choices or "" in choices:
        raise source.refuse("takes texts, none of them empty")
    if len(choices) > MAX_CHOICES or sum(map(len, choices)) > MAX_CHOICES_TEXT:
        raise source.refuse(
            f"takes at most {MAX_CHOICES} texts, of {MAX_CHOICES_TEXT} characters together"
        )
    return _lark("start: " + " | ".join(map(_quoted, dict.fromkeys(choices))))


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _grammar(source: _Source) -> str:
    text = source.value
    if len(text) > MAX_GRAMMAR:
        raise source.refuse(f"takes at most {MAX_GRAMMAR} characters")
    if _GBNF.search(text):
        return json.dumps({"gbnf": text})
    options: dict[str, Any] = {}
    for found in _HEADER.finditer(text):
        try:
            stated = json.loads(found[1])
        except (ValueError, RecursionError):
            stated = None
        if not isinstance(stated, dict):
            raise source.refuse("%llguidance takes a JSON object on its own line")
        options |= stated
    return _lark(_HEADER.sub("", text), options)


_READERS: dict[str, Callable[[_Source], str]] = {
    "json": _schema,
    "regex": _regex,
    "choice": _choice,
    "grammar": _grammar,
}
