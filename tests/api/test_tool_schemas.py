"""What required and named calls are held to: llguidance takes what fits and nothing else."""

from __future__ import annotations

import json
from typing import Any

import llguidance
import pytest

from service.api.constraints import json_schema_grammar
from service.api.json_schemas import moved
from service.api.readers.constrained import RequiredReader
from service.api.schemas.tools import Tool
from service.api.tool_schemas import calls_schema, parameters_of
from service.api.tools import ToolPlan

TREE = {
    "$schema": "http://json-schema.org/draft-07/schema#",
    "type": "object",
    "properties": {
        "node": {"$ref": "#/$defs/Node"},
        "same": {"$ref": "#/properties/kind"},
        "kind": {"enum": ["a", "b"]},
    },
    "required": ["node"],
    "$defs": {
        "Node": {
            "type": "object",
            "properties": {
                "value": {"type": "integer"},
                "next": {"anyOf": [{"$ref": "#/$defs/Node"}, {"type": "null"}]},
            },
            "required": ["value", "next"],
            "additionalProperties": False,
        }
    },
}
OTHER = {
    "type": "object",
    "properties": {"node": {"$ref": "#/definitions/Node"}},
    "required": ["node"],
    "definitions": {"Node": {"type": "string"}},
}


def tool(name: str, parameters: dict[str, Any] | None = None) -> Tool:
    function = {"name": name} | ({} if parameters is None else {"parameters": parameters})
    return Tool.model_validate({"type": "function", "function": function})


TOOLS = [tool("tree", TREE), tool("other", OTHER), tool("nothing")]


def grammar_of(plan: ToolPlan) -> str:
    constraint = plan.constraint()
    assert constraint is not None
    return constraint.grammar


def accepts(grammar: str, text: str) -> bool:
    tokenizer = llguidance.LLTokenizer("byte")
    matcher = llguidance.LLMatcher(tokenizer, grammar)
    assert not matcher.is_error(), matcher.get_error()
    tokens = tokenizer.tokenize_str(text)
    return bool(
        matcher.validate_tokens(tokens) == len(tokens)
        and matcher.consume_tokens(tokens)
        and matcher.is_accepting()
    )


def call(name: str, **parameters: Any) -> dict[str, Any]:
    return {"name": name, "parameters": parameters}


def written(*calls: dict[str, Any]) -> str:
    return json.dumps(calls, separators=(",", ":"))


CHAIN = {"value": 1, "next": {"value": 2, "next": None}}


@pytest.mark.parametrize(
    ("text", "is_right"),
    [
        (written(call("tree", node=CHAIN, same="a")), True),
        (written(call("other", node="x"), call("tree", node=CHAIN), call("nothing")), True),
        (written(call("tree", node="x")), False),
        (written(call("other", node=CHAIN)), False),
        (written(call("tree", node=CHAIN, same="c")), False),
        (written(call("tree")), False),
        (written(call("tree", node=CHAIN, more=1)), False),
        (written(call("nothing", more=1)), False),
        (written(call("unknown")), False),
        (written({"name": "nothing"}), False),
        ("[]", False),
        (written(call("nothing")).replace(",", ", "), False),
    ],
)
def test_required_answers_are_calls_that_fit(text: str, is_right: bool) -> None:
    assert accepts(grammar_of(ToolPlan(TOOLS, "required")), text) is is_right
    if is_right:
        reader = RequiredReader()
        delta = reader.push(text) + reader.flush()
        found = [call(c.name or "", **json.loads(c.arguments)) for c in delta.whole_calls()]
        assert found == json.loads(text)


def test_without_parallel_calls_there_is_one() -> None:
    grammar = grammar_of(ToolPlan(TOOLS, "required", is_parallel=False))
    assert accepts(grammar, written(call("nothing")))
    assert not accepts(grammar, written(call("nothing"), call("nothing")))


def test_a_named_answer_is_the_functions_arguments() -> None:
    grammar = grammar_of(ToolPlan(TOOLS, "tree", is_named=True))
    assert accepts(grammar, json.dumps({"node": CHAIN}, separators=(",", ":")))
    assert not accepts(grammar, '{"node":"x"}')
    assert accepts(grammar_of(ToolPlan(TOOLS, "nothing", is_named=True)), "{}")


def test_auto_and_none_are_free() -> None:
    assert ToolPlan(TOOLS, "auto").constraint() is ToolPlan().constraint() is None


def test_references_move_and_data_stays() -> None:
    schema = {
        "properties": {"$ref": {"$ref": "#"}, "enum": {"enum": [{"$ref": "#/x"}]}},
        "items": [{"$ref": "#/$defs/a"}, {"$ref": "http://elsewhere#/b"}],
        "default": {"$ref": "#/x"},
    }
    assert moved(schema, "#/$defs/f") == {
        "properties": {"$ref": {"$ref": "#/$defs/f"}, "enum": {"enum": [{"$ref": "#/x"}]}},
        "items": [{"$ref": "#/$defs/f/$defs/a"}, {"$ref": "http://elsewhere#/b"}],
        "default": {"$ref": "#/x"},
    }


def test_properties_nobody_named_are_left_out_unless_the_schema_says_otherwise() -> None:
    assert parameters_of(tool("f", {"properties": {}}))["additionalProperties"] is False
    said = {"properties": {}, "additionalProperties": {"type": "string"}}
    assert parameters_of(tool("f", said))["additionalProperties"] == {"type": "string"}
    combined = {"properties": {}, "anyOf": [{"properties": {"a": {}}}]}
    assert "additionalProperties" not in parameters_of(tool("f", combined))


def test_a_function_may_have_a_name_that_schemas_use() -> None:
    tools = [tool("properties", OTHER), tool("enum", TREE)]
    grammar = json_schema_grammar(calls_schema(tools, is_parallel=True))
    assert accepts(grammar, written(call("properties", node="x"), call("enum", node=CHAIN)))
