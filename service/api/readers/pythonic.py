"""``[f(a=1), g(b="x")]``: calls as Python literals, as Llama 3.2 and 4 write them.

Literals are read by a grammar of their own and said as JSON; nothing is evaluated. Without
``<|python_start|>`` before it the list must begin the answer and name functions there are.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from service.api.readers.hermes import any_name
from service.api.readers.json_text import (
    MAX_DEPTH,
    BareCallScanner,
    Emit,
    IsKnown,
    checked_number,
    escaped,
    ignore,
)
from service.api.readers.scanning import Malformed, Reading

OPEN, CLOSE = "<|python_start|>", "<|python_end|>"
WORDS = {"True": "true", "False": "false", "None": "null"} | {
    word: word for word in ("true", "false", "null")
}
ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "a": "\a", "v": "\v"} | {
    same: same for same in "\\'\""
}
HEXADECIMAL = {"x": 2, "u": 4, "U": 8}


class PythonicReader(BareCallScanner):
    def answer(self) -> Reading[None]:
        yield from self.attempt(self._calls(self.is_known))
        while (yield from self.text_until(OPEN)):
            yield from self.attempt(self._marked(), OPEN)
        self.end_content()

    def _marked(self) -> Reading[None]:
        yield from self._calls(any_name)
        self.keep()
        yield from self.blanks()
        if self.current == CLOSE[0]:
            yield from self.expect(CLOSE)

    def _calls(self, is_known: IsKnown) -> Reading[None]:
        yield from self.blanks()
        yield from self.expect("[")
        yield from self.blanks()
        yield from self._call(is_known)
        while self.current == ",":
            self.keep()
            yield from self.comma(ignore)
            if self.current == "]":
                break
            yield from self._call(is_known)
        yield from self.expect("]")

    def _call(self, is_known: IsKnown) -> Reading[None]:
        name = yield from self.word(".-")
        yield from self.blanks()
        if self.current != "(" or not is_known(name):
            raise Malformed
        self.begin_call(name)
        self.say_arguments("{")
        yield
        yield from self._keywords()
        yield from self.expect(")")
        self.say_arguments("}")
        self.end_arguments()
        yield from self.blanks()

    def _keywords(self) -> Reading[None]:
        seen: set[str] = set()
        yield from self.blanks()
        while self.current != ")":
            key = yield from self.word()
            if key in seen:
                raise Malformed
            yield from self.blanks()
            yield from self.expect("=")
            yield from self.blanks()
            self.say_arguments(f'{"," if seen else ""}"{key}":')
            seen.add(key)
            yield from self.literal(self.say_arguments)
            yield from self.blanks()
            if self.current == ",":
                yield from self.comma(ignore)
            elif self.current != ")":
                raise Malformed

    def word(self, more: str = "") -> Reading[str]:
        letters: list[str] = []
        while self.current and (self.current.isalnum() or self.current in "_" + more):
            letters.append(self.current)
            yield
        if not letters or letters[0].isdigit():
            raise Malformed
        return "".join(letters)

    def literal(self, emit: Emit, depth: int = 0) -> Reading[None]:
        if depth > MAX_DEPTH:
            raise Malformed
        match self.current:
            case "[":
                yield from self._elements("[", "]", self.literal, emit, depth)
            case "{":
                yield from self._elements("{", "}", self._dict_item, emit, depth)
            case '"' | "'":
                yield from self._python_string(emit)
            case letter if letter.isalpha():
                word = yield from self.word()
                if word not in WORDS:
                    raise Malformed
                emit(WORDS[word])
            case _:
                yield from self._python_number(emit)

    def _elements(
        self,
        opening: str,
        closing: str,
        element: Callable[[Emit, int], Reading[None]],
        emit: Emit,
        depth: int,
    ) -> Reading[None]:
        """With a comma after the last one, if the model likes."""
        yield from self.expect(opening)
        emit(opening)
        yield from self.blanks()
        is_first = True
        while self.current != closing:
            if not is_first:
                emit(",")
            is_first = False
            yield from element(emit, depth + 1)
            yield from self.blanks()
            if self.current == ",":
                yield from self.comma(ignore)
            elif self.current != closing:
                raise Malformed
        yield from self.expect(closing)
        emit(closing)

    def _dict_item(self, emit: Emit, depth: int) -> Reading[None]:
        yield from self._python_string(emit)
        yield from self.colon()
        emit(":")
        yield from self.literal(emit, depth)

    def _python_string(self, emit: Emit) -> Reading[None]:
        quote = self.current
        if not quote or quote not in "\"'":
            raise Malformed
        yield
        emit('"')
        while self.current != quote:
            if not self.current:
                raise Malformed
            if self.current == "\\":
                yield
                yield from self._python_escape(emit)
            else:
                emit(escaped(self.current))
                yield
        yield
        emit('"')

    def _python_escape(self, emit: Emit) -> Reading[None]:
        """As Python reads it: a letter that means nothing keeps its backslash."""
        letter = self.current
        if not letter:
            raise Malformed
        yield
        if letter in HEXADECIMAL:
            code = int((yield from self.hexadecimal(HEXADECIMAL[letter])), 16)
            if code > 0x10FFFF:
                raise Malformed
            emit(f"\\u{code:04x}" if 0xD800 <= code < 0xE000 else escaped(chr(code)))
        elif letter in ESCAPES:
            emit(escaped(ESCAPES[letter]))
        elif letter != "\n":
            emit("\\\\" + escaped(letter))

    def _python_number(self, emit: Emit) -> Reading[None]:
        """``.5`` and ``1.`` too, which JSON does not know."""
        text = (yield from self.number_text()).removeprefix("+")
        text = re.sub(r"^(-?)\.", r"\g<1>0.", text)
        emit(checked_number(re.sub(r"\.(?=[eE]|$)", ".0", text)))
