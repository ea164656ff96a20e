"""``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``, as Hermes and Qwen write it."""

from __future__ import annotations

from service.api.readers.json_text import JsonScanner
from service.api.readers.scanning import Reading

OPEN, CLOSE = "<tool_call>", "</tool_call>"


def any_name(_: str) -> bool:
    """A marked call is one whatever its name, as in vLLM."""
    return True


class HermesReader(JsonScanner):
    def answer(self) -> Reading[None]:
        while (yield from self.text_until(OPEN)):
            yield from self.attempt(self._call(), OPEN)
        self.end_content()

    def _call(self) -> Reading[None]:
        yield from self.blanks()
        yield from self.call_object(any_name)
        yield from self.blanks()
        yield from self.expect(CLOSE)
