"""What one render of a chat template may spend: characters, items, steps and processor time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.utils import Namespace

BUDGET = "\0budget"  # the context's name for it: no identifier a template could write
_BASE_UNITS, _UNITS_PER_CHARACTER = 4_000_000, 32
_BASE_SECONDS, _SECONDS_PER_CHARACTER = 0.3, 1e-6
_CHECK_EVERY = 64  # charges between two looks at the clock
_VIEWS: tuple[type, ...] = (type({}.keys()), type({}.values()), type({}.items()))


class TemplateLimit(SecurityError):
    """A template wanted more time or memory than any honest one needs."""


class Budget:
    """A unit is a character made, an item made or a step taken; seconds are the thread's own."""

    def __init__(self, input_characters: int) -> None:
        """Grows with what the client sent, because honest templates copy that a few times."""
        self._units = _BASE_UNITS + _UNITS_PER_CHARACTER * input_characters
        seconds = _BASE_SECONDS + _SECONDS_PER_CHARACTER * input_characters
        self._deadline = time.thread_time() + seconds
        self._unchecked = 0

    def spend(self, size: int) -> None:
        self._units -= size + 1
        if self._units < 0:
            raise TemplateLimit("the chat template makes too much text or takes too many steps")
        self._unchecked += 1
        if self._unchecked >= _CHECK_EVERY or size > 10_000:
            self._unchecked = 0
            if time.thread_time() > self._deadline:
                raise TemplateLimit("the chat template takes too long")

    def charged(self, value: Any) -> Any:
        """Charges for a value just made; iterators are charged as they are read."""
        if isinstance(value, str | list | tuple | dict):
            self.spend(len(value))
        elif isinstance(value, Iterator):
            return self.metered(value)
        return value

    def metered(self, items: Iterator[Any]) -> Iterator[Any]:
        for item in items:
            self.spend(1)
            yield item

    def count(self, value: Any) -> None:
        """Charges for every node of a nested value, so that Python may walk it afterwards."""
        if not isinstance(value, _CONTAINERS):
            return
        pending = [value]
        while pending:
            container = pending.pop()
            self.spend(1)
            for child in _children(container):
                self.spend(0)
                if isinstance(child, _CONTAINERS):
                    pending.append(child)

    def text(self, value: Any) -> str:
        """``str(value)``, counted before and charged after."""
        if not isinstance(value, str):
            self.count(value)
            value = str(value)
        self.spend(len(value))
        return str(value)


_CONTAINERS = (list, tuple, dict, set, frozenset, Namespace, *_VIEWS)


def _children(container: Any) -> Iterator[Any]:
    if isinstance(container, Namespace):
        container = object.__getattribute__(container, "_Namespace__attrs")
    if isinstance(container, dict):
        yield from container.keys()
        yield from container.values()
    else:
        yield from container


def budget_of(context: Context) -> Budget:
    budget = context.parent[BUDGET]
    assert isinstance(budget, Budget)
    return budget
