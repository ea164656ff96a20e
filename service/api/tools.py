"""Which functions an answer may call, and how it is held to that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from service.api.constraints import Constraint, json_schema_grammar, read_constraint
from service.api.dialects import Dialect
from service.api.readers.constrained import NamedReader, RequiredReader
from service.api.reading import AnswerReader, PlainText
from service.api.schemas.chat import ChatRequest
from service.api.schemas.tools import AllowedChoice, NamedChoice, Tool
from service.api.tool_schemas import calls_schema, parameters_of
from service.errors import InvalidRequest
from service.redaction import Redacted

MAX_TOOLS_JSON = 256 * 1024  # characters
ENDS = ("stop", "stop_token_ids", "include_stop_str_in_output")
MAX_DEPTH = 64  # of nested JSON in one tool


@dataclass(frozen=True, slots=True, repr=False)
class ToolPlan(Redacted):
    """``tools`` are those the model is told of and may call. ``choice``: none, auto, required, or
    the name of the one function it has to call (``is_named``)."""

    tools: Sequence[Tool] = field(default_factory=tuple)
    choice: str = "none"
    is_named: bool = False
    is_parallel: bool = True

    @property
    def is_constrained(self) -> bool:
        return self.is_named or self.choice == "required"

    @property
    def is_auto(self) -> bool:
        return self.choice == "auto" and not self.is_named

    def for_template(self) -> list[dict[str, Any]]:
        return [tool.for_template() for tool in self.tools]

    def reader(self, dialect: Dialect) -> AnswerReader:
        if self.is_named:
            return NamedReader(self.choice, make_id=dialect.make_id)
        if self.choice == "required":
            return RequiredReader(make_id=dialect.make_id)
        if self.is_auto:
            names = {tool.function.name for tool in self.tools}
            return dialect.reader(names, None if self.is_parallel else 1)
        return PlainText()

    def overruled(self, fields: ChatRequest) -> list[str]:
        """Fields that come to nothing beside this plan, or because of which it does."""
        if self.is_constrained:
            return [name for name in ENDS if getattr(fields, name)]
        return ["tools"] if self.is_auto and read_constraint(fields) is not None else []

    def in_force(self, fields: ChatRequest) -> ChatRequest:
        """Nothing cuts a call short that has to satisfy its schema."""
        if not self.is_constrained:
            return fields
        if fields.echo:
            raise _refused("echo", "cannot be used where a call is all that is answered")
        return fields.model_copy(update=dict.fromkeys(ENDS))

    def constraint(self) -> Constraint | None:
        """What the text must be; None where the model is free."""
        if not self.is_constrained:
            return None
        return Constraint("tools", json_schema_grammar(self.schema()))

    def schema(self) -> dict[str, Any]:
        if self.is_named:
            return next(
                parameters_of(tool) for tool in self.tools if tool.function.name == self.choice
            )
        return calls_schema(self.tools, is_parallel=self.is_parallel)


def read_tools(tools: Sequence[Tool] | None) -> list[Tool]:
    """Raises ``InvalidRequest`` for tools that are no functions with parameters of their own."""
    names: set[str] = set()
    for index, tool in enumerate(tools or ()):
        path = f"tools[{index}].function"
        if tool.function.name in names:
            raise _refused(f"{path}.name", f"{tool.function.name!r} is there twice")
        names.add(tool.function.name)
        parameters = tool.function.parameters or {}
        if parameters.get("type", "object") != "object":
            raise _refused(f"{path}.parameters", 'must be a schema of type "object"')
        if is_deeper([parameters, tool.model_extra, tool.function.model_extra], MAX_DEPTH):
            raise _refused(path, f"is nested deeper than {MAX_DEPTH}")
    size = num_characters(tools)
    if size > MAX_TOOLS_JSON:
        raise _refused("tools", f"have {size} characters of JSON; at most {MAX_TOOLS_JSON}")
    return list(tools or ())


def is_deeper(value: Any, depth: int) -> bool:
    """Level by level, so that no nesting is too deep to be told."""
    level = [value]
    for _ in range(depth):
        containers = [item for item in level if isinstance(item, dict | list)]
        level = [
            child
            for item in containers
            for child in (item.values() if isinstance(item, dict) else item)
        ]
    return any(isinstance(item, dict | list) for item in level)


def num_characters(tools: Sequence[Tool] | None) -> int:
    return sum(len(tool.model_dump_json()) for tool in tools or ())


def read_plan(fields: ChatRequest) -> ToolPlan:
    """From the request's fields. Raises ``InvalidRequest`` for a choice of tools that are not
    there."""
    tools, choice = read_tools(fields.tools), fields.tool_choice
    parallel = fields.parallel_tool_calls is not False
    if choice == "none" or (choice is None and not tools):
        return ToolPlan()
    if not tools:
        raise _refused("tool_choice", "needs tools")
    if isinstance(choice, NamedChoice):
        name = choice.function.name
        _check_known([name], tools, "tool_choice.function.name")
        return ToolPlan(tools, name, is_named=True)
    if isinstance(choice, AllowedChoice):
        allowed = choice.allowed_tools
        names = [tool.function.name for tool in allowed.tools]
        _check_known(names, tools, "tool_choice.allowed_tools.tools")
        tools = [tool for tool in tools if tool.function.name in names]
        return ToolPlan(tools, allowed.mode, is_parallel=parallel)
    return ToolPlan(tools, choice or "auto", is_parallel=parallel)


def _check_known(names: Sequence[str], tools: Sequence[Tool], param: str) -> None:
    known = {tool.function.name for tool in tools}
    if unknown := [name for name in names if name not in known]:
        raise _refused(param, f"{unknown[0][:64]!r} is none of the tools")


def _refused(param: str, message: str) -> InvalidRequest:
    return InvalidRequest(f"{param}: {message}", param=param)
