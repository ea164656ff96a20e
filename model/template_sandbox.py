"""The jinja environment that runs checkpoints' chat templates as what they are: untrusted programs.

jinja's sandbox keeps a template from reaching Python's internals; nothing in jinja bounds its time
and memory. Here every loop step, call, filter, concatenation and printed character is charged to a
budget that each render carries in its context, operations whose result could be huge are charged
before they run, and what walks nested values (printing, comparing, hashing) counts their nodes
first.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from model import template_filters as filters
from model.template_budget import BUDGET, Budget, TemplateLimit, budget_of

_MAX_SOURCE = 256 * 1024  # characters; the longest templates published are below 60,000
_MAX_INT_BITS = 4096
_MAX_TIME_FORMAT = 64
_FORBIDDEN_METHODS = frozenset({"encode", "translate", "maketrans", "to_bytes", "fromkeys"})


class TemplateRefused(jinja2.TemplateError):
    """The template itself refused the conversation, by raise_exception."""


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """What transformers gives chat templates, metered."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            finalize=_finalize,
            extensions=[_GenerationTag, "jinja2.ext.loopcontrols"],
            optimized=False,  # folding constants would run filters outside any budget
        )
        self.filters = filters.metered_filters()
        self.tests = filters.metered_tests()  # type: ignore[assignment]
        del self.globals["lipsum"]
        self.globals.update(dict=_make_dict, namespace=Namespace, raise_exception=_raise_exception)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        if len(source) > _MAX_SOURCE:
            raise TemplateLimit(f"the template is longer than {_MAX_SOURCE} characters")
        tree = _Meter().visit(super()._parse(source, name, filename))
        tree.set_environment(self)
        assert isinstance(tree, nodes.Template)
        return tree

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return attr not in _FORBIDDEN_METHODS and super().is_safe_attribute(obj, attr, value)

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        raise SecurityError(f"a template may not reach {attribute!r} of a {type(obj).__name__}")

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget = budget_of(context)
        _charge_binop(budget, operator, left, right)
        return budget.charged(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        budget = budget_of(__context)
        budget.spend(1)
        method = getattr(__obj, "__wrapped__", __obj)  # str.format comes wrapped by the sandbox
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str | list | tuple | dict):
            args = _charge_method(budget, owner, method.__name__, args, kwargs)
        return budget.charged(super().call(__context, __obj, *args, **kwargs))


def render(template: jinja2.Template, variables: Mapping[str, Any], budget: Budget) -> str:
    """Runs a template of a ChatEnvironment; any exception may come out of a hostile one."""
    moment = datetime.now()

    def strftime_now(format: str) -> str:
        if len(format) > _MAX_TIME_FORMAT:
            raise TemplateLimit("a time format is too long")
        return moment.strftime(format)

    context = template.new_context({"strftime_now": strftime_now, **variables, BUDGET: budget})
    return "".join(template.root_render_func(context))


class _GenerationTag(Extension):
    """``{% generation %}``, which marks an assistant's text for training, means nothing here."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Meter(NodeTransformer):
    """Writes the charges into a template's syntax tree, where no template can take them out."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, _charge(node, 0))
        if node.test is not None:
            node.test = nodes.And(_charge(node, 0).node, node.test, lineno=node.lineno)
        return node

    def visit_Output(self, node: nodes.Output) -> list[nodes.Node]:
        size = sum(len(part.data) for part in node.nodes if isinstance(part, nodes.TemplateData))
        self.generic_visit(node)
        return [_charge(node, size), node]

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes, lineno=node.lineno), filters.CONCAT)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            bounds = (node.arg.start, node.arg.stop, node.arg.step)
            return _filter(
                node.node, filters.SLICE, *(bound or nodes.Const(None) for bound in bounds)
            )
        node.arg = _countable(node.arg)
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = _countable(node.expr)
        for operand in node.ops:
            operand.expr = _countable(operand.expr, looked_up=operand.op in ("in", "notin"))
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:
        self.generic_visit(node)
        node.key = _countable(node.key)
        return node


def _filter(node: nodes.Expr, name: str, *args: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, name, list(args), [], None, None, lineno=node.lineno)


def _charge(node: nodes.Node, size: int) -> nodes.ExprStmt:
    call = _filter(nodes.Const(size, lineno=node.lineno), filters.CHARGE)
    return nodes.ExprStmt(call, lineno=node.lineno)


def _countable(node: nodes.Expr, looked_up: bool = False) -> nodes.Expr:
    """An operand whose nodes are counted before Python compares or hashes it."""
    if isinstance(node, nodes.Const):
        return node
    return _filter(node, filters.COUNT, nodes.Const(looked_up, lineno=node.lineno))


@pass_context
def _finalize(context: Context, value: Any) -> str:
    return budget_of(context).text(value)


def _make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    """The type itself would offer its class methods."""
    return dict(*args, **kwargs)


def _raise_exception(message: str) -> None:
    raise TemplateRefused(str(message)[:1000])


def _charge_binop(budget: Budget, operator: str, left: Any, right: Any) -> None:
    """Charges what the result will weigh, before it exists."""
    if operator == "*":
        _charge_product(budget, left, right)
    elif operator == "**":
        _check_power(left, right)
    elif operator == "%" and isinstance(left, str):
        filters.check_percent_format(left)
        budget.count(right)
    elif operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__"):
        budget.spend(len(left) + len(right))


def _charge_product(budget: Budget, left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        if left.bit_length() + right.bit_length() > _MAX_INT_BITS:
            raise TemplateLimit("a number is too large")
    elif isinstance(left, int) and hasattr(right, "__len__"):
        budget.spend(max(left, 0) * len(right))
    elif isinstance(right, int) and hasattr(left, "__len__"):
        budget.spend(max(right, 0) * len(left))


def _check_power(left: Any, right: Any) -> None:
    both_int = isinstance(left, int) and isinstance(right, int)
    if both_int and right > 0 and left.bit_length() * right > _MAX_INT_BITS:
        raise TemplateLimit("a number is too large")


def _charge_method(
    budget: Budget, owner: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, ...]:
    """Charges a method of a plain value; returns the arguments, iterators in them read."""
    for value in (*args, *kwargs.values()):
        budget.count(value)
    if isinstance(owner, list | tuple):
        budget.count(owner)  # index and count compare with what is inside
    if not isinstance(owner, str):
        return args
    if name in ("center", "ljust", "rjust", "zfill") and args:
        budget.spend(max(int(args[0]), 0))
    elif name == "expandtabs":
        budget.spend(owner.count("\t") * abs(int((*args, kwargs.get("tabsize", 8))[0])))
    elif name == "replace" and len(args) > 1:
        filters.charge_replace(budget, owner, str(args[0]), str(args[1]))
    elif name == "join" and args:
        parts = list(budget.metered(iter(args[0])))
        budget.spend(sum(len(part) + len(owner) for part in parts if isinstance(part, str)))
        return (parts,)
    elif name in ("format", "format_map"):
        filters.check_brace_format(owner)
    return args
