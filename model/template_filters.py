"""jinja's filters and tests as chat templates need them, each charged to the render's budget.

A list of those allowed, not of those forbidden: the ones left out (urlize, pprint, xmlattr ...)
make HTML or inspect objects, and no chat template uses them.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

from jinja2 import filters as jinja_filters
from jinja2 import pass_context
from jinja2.runtime import Context
from jinja2.tests import TESTS
from jinja2.utils import _PassArg

from model.template_budget import Budget, TemplateLimit, budget_of

# Names that the syntax tree is rewritten to call; no template can spell them.
CHARGE, CONCAT, COUNT, SLICE = "\0charge", "\0concat", "\0count", "\0slice"
MARK = "\0mark"  # the context's name for the character that breaks special spellings in contents

# Filters that look at their input's items only, and so need no count of what is nested inside.
_SHALLOW = """
abs attr count d default first float int items last length list map reject rejectattr reverse
round safe select selectattr
""".split()  # noqa: SIM905
_DEEP = """
capitalize dictsort e escape forceescape groupby lower max min sort string title trim truncate
unique upper wordcount
""".split()  # noqa: SIM905
_COMPARING = """
== eq equalto != ne > gt greaterthan >= ge < lt lessthan <= le in
""".split()  # noqa: SIM905
_MAX_WIDTH, _MAX_INDENT, _MAX_DIGITS = 100_000, 64, 100
_PERCENT_WIDTH = re.compile(r"%(?:\([^)]*\))?[^a-zA-Z%]*(?:\*|\d{4,})")
_BRACE_WIDTH = re.compile(r"\d{4,}|[{}]")

Filter = Callable[..., Any]


def metered_filters() -> dict[str, Filter]:
    library = jinja_filters.FILTERS
    known: dict[str, Filter] = {name: _metered(library[name], deep=False) for name in _SHALLOW}
    known |= {name: _metered(library[name], deep=True) for name in _DEEP}
    own: list[Filter] = [batch, center, format, indent, join, replace, round, slice, sum, tojson]
    for function in own:
        known[function.__name__] = _metered(function, deep=False)
    return known | {CHARGE: _charge, CONCAT: _concat, COUNT: _count, SLICE: _slice_of}


def metered_tests() -> dict[str, Filter]:
    return {name: _metered(function, deep=name in _COMPARING) for name, function in TESTS.items()}


def _metered(function: Any, *, deep: bool) -> Filter:
    """Taking the context also keeps jinja from running it on constants while compiling."""
    wanted = _PassArg.from_obj(function)

    @pass_context
    @wraps(function)
    def metered(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        budget = budget_of(context)
        if deep:
            budget.count(value)
        for argument in (*args, *kwargs.values()):
            budget.count(argument)
        first = _first_arguments(context, wanted)
        return budget.charged(function(*first, value, *args, **kwargs))

    return metered


def _first_arguments(context: Context, wanted: _PassArg | None) -> tuple[Any, ...]:
    if wanted is _PassArg.context:
        return (context,)
    if wanted is _PassArg.eval_context:
        return (context.eval_ctx,)
    return (context.environment,) if wanted is _PassArg.environment else ()


@pass_context
def _charge(context: Context, size: int) -> bool:
    budget_of(context).spend(size)
    return True


@pass_context
def _concat(context: Context, parts: list[Any]) -> str:
    budget = budget_of(context)
    return "".join([budget.text(part) for part in parts])


@pass_context
def _count(context: Context, value: Any, looked_up: bool) -> Any:
    """Looking a key up in a dict hashes the key alone."""
    if not (looked_up and isinstance(value, dict)):
        budget_of(context).count(value)
    return value


@pass_context
def _slice_of(context: Context, value: Any, start: Any, stop: Any, step: Any) -> Any:
    return budget_of(context).charged(value[start:stop:step])


@pass_context
def tojson(
    context: Context,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers has it: no HTML escapes, and letters beyond ASCII as they are."""
    budget_of(context).count(value)
    if indent is not None and not 0 <= int(indent) <= _MAX_INDENT:
        raise TemplateLimit("tojson indents too far")
    dumped = json.dumps(
        value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys
    )
    return _escaped(dumped, context.parent.get(MARK, "")) if ensure_ascii else dumped


def _escaped(dumped: str, mark: str) -> str:
    """ASCII only, but for the mark, which is none of the text."""
    return "".join(
        letter if letter.isascii() or letter == mark else json.dumps(letter)[1:-1]
        for letter in dumped
    )


@pass_context
def join(context: Context, value: Iterable[Any], d: str = "", attribute: Any = None) -> str:
    budget = budget_of(context)
    if attribute is not None:
        value = map(jinja_filters.make_attrgetter(context.environment, attribute), value)
    parts = [budget.text(part) for part in value]
    separator = budget.text(d)
    budget.spend(len(separator) * len(parts))
    return separator.join(parts)


@pass_context
def replace(context: Context, s: Any, old: Any, new: Any, count: int | None = None) -> str:
    budget = budget_of(context)
    text, old, new = budget.text(s), budget.text(old), budget.text(new)
    charge_replace(budget, text, old, new)
    return text.replace(old, new, -1 if count is None else count)


def charge_replace(budget: Budget, text: str, old: str, new: str) -> None:
    budget.spend(text.count(old) * len(new))


@pass_context
def indent(
    context: Context, s: Any, width: int | str = 4, first: bool = False, blank: bool = False
) -> str:
    budget = budget_of(context)
    text = budget.text(s)
    budget.spend((text.count("\n") + 1) * (width if isinstance(width, int) else len(width)))
    return jinja_filters.do_indent(text, width, first, blank)


@pass_context
def center(context: Context, value: Any, width: int = 80) -> str:
    return budget_of(context).text(value).center(_bounded(width))


@pass_context
def format(context: Context, value: Any, *args: Any, **kwargs: Any) -> str:
    text = budget_of(context).text(value)
    check_percent_format(text)
    return jinja_filters.do_format(text, *args, **kwargs)


def batch(value: Iterable[Any], linecount: int, fill_with: Any = None) -> Any:
    return jinja_filters.do_batch(value, _bounded(linecount), fill_with)


def slice(value: Any, slices: int, fill_with: Any = None) -> Any:
    return jinja_filters.sync_do_slice(value, _bounded(slices), fill_with)


def round(value: float, precision: int = 0, method: Any = "common") -> float:
    if abs(precision) > _MAX_DIGITS:
        raise TemplateLimit("a number is rounded to too many digits")
    return jinja_filters.do_round(value, precision, method)


@pass_context
def sum(
    context: Context, iterable: Iterable[Any], attribute: Any = None, start: float = 0
) -> float:
    """Of numbers only: adding lists up would copy them over and over."""
    if attribute is not None:
        iterable = map(jinja_filters.make_attrgetter(context.environment, attribute), iterable)
    for number in iterable:
        if not isinstance(number, int | float):
            raise TemplateLimit("sum adds numbers only")
        start += number
    return start


def check_percent_format(text: str) -> None:
    if _PERCENT_WIDTH.search(text):
        raise TemplateLimit("a format pads too far")


def check_brace_format(text: str) -> None:
    """Refuses widths of four digits and widths taken from arguments."""
    for _, _, spec, _ in string.Formatter().parse(text):
        if spec and _BRACE_WIDTH.search(spec):
            raise TemplateLimit("a format pads too far")


def _bounded(width: int) -> int:
    if width > _MAX_WIDTH:
        raise TemplateLimit("a filter is asked for too much")
    return width
