"""Answers that a grammar holds to JSON: all they are is calls, and their content is null."""

from __future__ import annotations

from collections.abc import Callable

from service.api.readers.hermes import any_name
from service.api.readers.json_text import JsonScanner, ignore
from service.api.readers.scanning import Reading, make_call_id


class _CallsAlone(JsonScanner):
    """Should the text not be what was asked for after all, it is content, so that none is lost; of
    one that was cut only calls that had begun are said."""

    def answer(self) -> Reading[None]:
        yield from self.attempt(self.calls())
        yield from self.rest_is_content()

    def spoil(self) -> None:
        if self.current:
            super().spoil()

    def calls(self) -> Reading[None]:
        raise NotImplementedError


class RequiredReader(_CallsAlone):
    """``[{"name": ..., "parameters": {...}}, ...]``"""

    def calls(self) -> Reading[None]:
        yield from self.expect("[")
        yield from self.call_object(any_name)
        while self.current == ",":
            self.keep()
            yield from self.comma(ignore)
            yield from self.call_object(any_name)
        yield from self.expect("]")


class NamedReader(_CallsAlone):
    """The arguments of one call."""

    def __init__(self, name: str, *, make_id: Callable[[], str] = make_call_id) -> None:
        self._name = name
        super().__init__(make_id=make_id)

    def calls(self) -> Reading[None]:
        yield from self.arguments(self._name)
