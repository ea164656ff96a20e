"""schemathesis over the service's own OpenAPI page: no 5xx, and every answer as its schema says.

Bodies that fit the schemas and bodies that do not, made from the page alone; the same in every run.
"""

from __future__ import annotations

import re
from urllib.parse import unquote

import pytest
import schemathesis
from hypothesis import settings
from schemathesis import BaseSchema, Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from service.api.app import create_app
from service.registry import ModelRegistry
from service.settings import Settings
from tests.api.fakes import FakeEngine, served

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
PLAIN: dict[str, dict[str, object]] = {
    "/v1/completions": {"prompt": "Hi"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}]},
    "/tokenize": {"prompt": "Hi", "messages": None},
    "/detokenize": {"tokens": [65]},
}
MOST_DROPPED = 60  # fields


def page(*modes: GenerationMode, every_case: bool = False) -> BaseSchema:
    """``every_case``: also each bound of each field, one after the other, which takes a while."""
    app = create_app(Settings(), ModelRegistry([served(FakeEngine())]))
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    schema.config.generation.modes = list(modes)
    schema.config.phases.coverage.enabled = every_case
    return schema


anything = page(*GenerationMode)
good = page(GenerationMode.POSITIVE).include(path=list(PLAIN))
everything = page(*GenerationMode, every_case=True)


@anything.parametrize()
@settings(max_examples=25, deadline=None, derandomize=True, database=None)
def test_no_request_makes_an_answer_the_page_does_not_describe(case: Case) -> None:
    case.call_and_validate(checks=CHECKS)


@good.parametrize()
@settings(max_examples=25, deadline=None, derandomize=True, database=None)
def test_without_the_fields_refusals_name_a_good_body_is_answered(case: Case) -> None:
    """What a page cannot say (bounds of the model, what is not served) refusals name instead."""
    assert isinstance(case.body, dict)
    body = case.body
    body |= PLAIN[case.operation.path] | {"strict": None}
    for _ in range(MOST_DROPPED):
        answer = case.call_and_validate(checks=CHECKS)
        if answer.status_code == 200:
            return
        error = answer.json()["error"]
        field = re.split(r"[.\[]", unquote(error["param"]))[0]
        assert field in body, error
        del body[field]
    raise AssertionError(f"{case.operation.path} still refuses {body}")


@pytest.mark.slow
@everything.parametrize()
@settings(max_examples=500, deadline=None, derandomize=True, database=None)
def test_every_bound_and_many_bodies_more(case: Case) -> None:
    case.call_and_validate(checks=CHECKS)


def test_no_status_stands_on_the_page_that_never_comes() -> None:
    page = create_app(Settings(), ModelRegistry([served(FakeEngine())])).openapi()
    operations = [one for path in page["paths"].values() for one in path.values()]
    assert all("422" not in operation["responses"] for operation in operations)
    assert "ValidationError" not in page["components"]["schemas"]
