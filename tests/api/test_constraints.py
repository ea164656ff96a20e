from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from model.grammar import Grammar, GrammarError, GrammarState
from service.api.constraints import json_schema_grammar, read_constraint
from service.api.ignored import unknown_fields
from service.api.schemas.sampling import SamplingFields
from service.errors import InvalidRequest
from tests.model.test_grammar import BYTES


def read(**fields: Any) -> GrammarState:
    constraint = read_constraint(SamplingFields.model_validate(fields))
    assert constraint is not None
    return Grammar(constraint.grammar, BYTES).start()


def accepts(state: GrammarState, text: str) -> bool:
    try:
        state.take(list(text.encode()))
    except GrammarError:
        return False
    return state.may_end


@pytest.mark.parametrize("fields", [{}, {"response_format": {"type": "text"}}])
def test_most_requests_ask_for_nothing(fields: dict[str, Any]) -> None:
    assert read_constraint(SamplingFields.model_validate(fields)) is None


@pytest.mark.parametrize(
    ("regex", "text"),
    [
        ("a/b", "a/b"),
        (r"a\/b", "a/b"),
        (r"a\\/b", "a\\/b"),
        ("a\nb", "a\nb"),
        ("[/]+", "//"),
        ('"é"', '"é"'),
        (r"\d{2}|x", "12"),
        ("a|b", "b"),
    ],
)
def test_patterns_survive_being_written_into_a_grammar(regex: str, text: str) -> None:
    assert accepts(read(guided_regex=regex), text)
    assert not accepts(read(guided_regex=regex), text + "!")


@pytest.mark.parametrize(
    "choice", ["a", 'q"', "back\\slash", "two\nlines", "tab\t", "日本", "\x07"]
)
def test_choices_are_taken_literally(choice: str) -> None:
    state = read(structured_outputs={"choice": ["other", choice]})
    assert accepts(state, choice)
    assert state.is_complete


def test_json_has_no_white_space() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    for fields in (
        {"guided_json": schema},
        {"guided_json": json.dumps(schema)},
        {"structured_outputs": {"json": schema, "disable_any_whitespace": True}},
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "n", "schema": schema},
            }
        },
    ):
        assert accepts(read(**fields), '{"a":12}')
        assert not accepts(read(**fields), '{"a": 12}')
        assert not accepts(read(**fields), '{"b":12}')
    assert json.loads(json_schema_grammar(schema))["grammars"]


def test_a_lark_grammar_keeps_its_options() -> None:
    grammar = '%llguidance {"allow_invalid_utf8": true}\nstart: "a" /b+/'
    constraint = read_constraint(SamplingFields(guided_grammar=grammar))
    assert constraint is not None
    assert "allow_invalid_utf8" in constraint.grammar
    assert accepts(read(guided_grammar=grammar), "abb")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"guided_regex": "a", "guided_json": {}}, "guided_regex"),
        ({"guided_json": {}, "response_format": {"type": "json_object"}}, "guided_json"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"json_object": False}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": "[]"}, "guided_json"),
        ({"guided_json": {"enum": ["x" * 200_000]}}, "guided_json"),
        (
            {
                "guided_json": json.loads("[" * 99 + "]" * 99)
                and {"a": json.loads("[" * 99 + "]" * 99)}
            },
            "guided_json",
        ),
        ({"guided_regex": "a" * 20_000}, "guided_regex"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": ["a", ""]}, "guided_choice"),
        ({"guided_choice": ["a"] * 1001}, "guided_choice"),
        ({"guided_choice": ["a" * 70_000]}, "guided_choice"),
        ({"guided_grammar": "start: a" + " " * 70_000}, "guided_grammar"),
        ({"guided_grammar": "%llguidance {\nstart: /a/"}, "guided_grammar"),
    ],
)
def test_what_is_refused_names_its_field(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read_constraint(SamplingFields.model_validate(fields))
    assert caught.value.param == param
    assert len(caught.value.message) < 300


@pytest.mark.parametrize(
    "fields",
    [
        {"guided_regex": 1},
        {"guided_choice": "a"},
        {"structured_outputs": {"json": 1}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": ""}}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
        {"response_format": {"type": "xml"}},
    ],
)
def test_wrong_types_are_no_request(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        SamplingFields.model_validate(fields)


def test_options_nobody_reads_are_named() -> None:
    fields = {"structured_outputs": {"regex": "a", "whitespace_pattern": " "}}
    found = list(unknown_fields(SamplingFields.model_validate(fields)))
    assert found == ["structured_outputs.whitespace_pattern"]
