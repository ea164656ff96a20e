"""``[TOOL_CALLS]`` and then ``[{"name": ..., "arguments": {...}}, ...]``, as Mistral writes it, or
``name{...}`` as its newer models do (``name[CALL_ID]id[ARGS]{...}`` between the two).
"""

from __future__ import annotations

import secrets
import string

from service.api.readers.hermes import any_name
from service.api.readers.json_text import JsonScanner, ignore
from service.api.readers.scanning import Malformed, Reading

OPEN, CALL_ID, ARGUMENTS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
NAME_LETTERS = frozenset(string.ascii_letters + string.digits + "_-.")
ID_LENGTH = 9


def make_short_id() -> str:
    """Mistral's templates take no other ids back."""
    letters = string.ascii_letters + string.digits
    return "".join(secrets.choice(letters) for _ in range(ID_LENGTH))


class MistralReader(JsonScanner):
    def answer(self) -> Reading[None]:
        while (yield from self.text_until(OPEN)):
            yield from self.attempt(self._calls(), OPEN)
        self.end_content()

    def _calls(self) -> Reading[None]:
        yield from self.blanks()
        if self.current == "[":
            yield from self.call_list()
        elif self.current == "{":
            yield from self.call_object(any_name)
        else:
            yield from self._named_call()

    def call_list(self) -> Reading[None]:
        yield from self.expect("[")
        yield from self.blanks()
        yield from self.call_object(any_name)
        yield from self.blanks()
        while self.current == ",":
            self.keep()
            yield from self.comma(ignore)
            yield from self.call_object(any_name)
            yield from self.blanks()
        yield from self.expect("]")

    def _named_call(self) -> Reading[None]:
        name = yield from self.word()
        yield from self.blanks()
        if self.current == "[":
            yield
            if self.current == CALL_ID[1]:
                yield from self.expect(CALL_ID[1:])
                yield from self.word()
                yield from self.expect("[")
            yield from self.expect(ARGUMENTS[1:])
            yield from self.blanks()
        if self.current != "{":
            raise Malformed
        yield from self.arguments(name)

    def word(self) -> Reading[str]:
        letters: list[str] = []
        while self.current in NAME_LETTERS:
            letters.append(self.current)
            yield
        if not letters:
            raise Malformed
        return "".join(letters)
