"""``{"name": ..., "parameters": {...}}``, several with ``;`` between, as Llama 3 writes it.

Without ``<|python_tag|>`` before it a call must begin the answer and name a function there is:
JSON in a text is mostly somebody's data.
"""

from __future__ import annotations

from service.api.readers.hermes import any_name
from service.api.readers.json_text import BareCallScanner, IsKnown
from service.api.readers.scanning import Reading

TAG = "<|python_tag|>"


class LlamaJsonReader(BareCallScanner):
    def answer(self) -> Reading[None]:
        if (yield from self.attempt(self._call(self.is_known))):
            yield from self._more(self.is_known)
        while (yield from self.text_until(TAG)):
            if (yield from self.attempt(self._call(any_name), TAG)):
                yield from self._more(any_name)
        self.end_content()

    def _more(self, is_known: IsKnown) -> Reading[None]:
        while self.current and self.current in "; \n{":
            if not (yield from self.attempt(self._next(is_known))):
                return

    def _call(self, is_known: IsKnown) -> Reading[None]:
        yield from self.blanks()
        yield from self.call_object(is_known)

    def _next(self, is_known: IsKnown) -> Reading[None]:
        yield from self.blanks()
        if self.current == ";":
            yield
            yield from self.blanks()
        if self.current == TAG[0]:
            yield from self.expect(TAG)
            yield from self.blanks()
        yield from self.call_object(is_known)
