"""JSON read character by character and said again compact, as valid JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection
from typing import Any

import msgspec

from service.api.readers.scanning import Malformed, Reading, Scanner, make_call_id

Emit = Callable[[str], None]
IsKnown = Callable[[str], bool]  # whether a name is one a call may have
MAX_DEPTH = 64
NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
ESCAPED = set('"\\/bfnrt')
ARGUMENT_KEYS = {"arguments", "parameters"}
OTHER_KEYS = {"type", "id"}  # of a call; read and not looked at


def ignore(_: str) -> None:
    """What is read and not said."""


def escaped(character: str) -> str:
    """A character as it may stand in a JSON string."""
    if character in '"\\' or character < " ":
        return json.dumps(character)[1:-1]
    return character


def checked_number(text: str) -> str:
    if not NUMBER.fullmatch(text):
        raise Malformed
    return text


def whole_object(text: str) -> str | None:
    """``text`` as compact JSON if it is an object; models write arguments as a string, too."""
    try:
        value = msgspec.json.decode(text)
    except (msgspec.MsgspecError, RecursionError, UnicodeError):
        return None
    return msgspec.json.encode(value).decode() if isinstance(value, dict) else None


class JsonScanner(Scanner):
    """Grammars of JSON. Control characters in strings, which JSON forbids, are escaped."""

    def value(self, emit: Emit, depth: int = 0) -> Reading[None]:
        if depth > MAX_DEPTH:
            raise Malformed
        match self.current:
            case "{":
                yield from self.object(emit, depth)
            case "[":
                yield from self.array(emit, depth)
            case '"':
                yield from self.string(emit)
            case "t" | "f" | "n":
                word = {"t": "true", "f": "false", "n": "null"}[self.current]
                yield from self.expect(word)
                emit(word)
            case _:
                yield from self.number(emit)

    def object(self, emit: Emit, depth: int = 0) -> Reading[None]:
        yield from self.expect("{")
        emit("{")
        yield from self.blanks()
        if self.current != "}":
            yield from self.pair(emit, depth)
            while self.current == ",":
                yield from self.comma(emit)
                yield from self.pair(emit, depth)
        yield from self.expect("}")
        emit("}")

    def pair(self, emit: Emit, depth: int) -> Reading[None]:
        yield from self.string(emit)
        yield from self.colon()
        emit(":")
        yield from self.value(emit, depth + 1)
        yield from self.blanks()

    def array(self, emit: Emit, depth: int = 0) -> Reading[None]:
        yield from self.expect("[")
        emit("[")
        yield from self.blanks()
        if self.current != "]":
            yield from self.item(emit, depth)
            while self.current == ",":
                yield from self.comma(emit)
                yield from self.item(emit, depth)
        yield from self.expect("]")
        emit("]")

    def item(self, emit: Emit, depth: int) -> Reading[None]:
        yield from self.value(emit, depth + 1)
        yield from self.blanks()

    def comma(self, emit: Emit) -> Reading[None]:
        yield from self.expect(",")
        emit(",")
        yield from self.blanks()

    def colon(self) -> Reading[None]:
        yield from self.blanks()
        yield from self.expect(":")
        yield from self.blanks()

    def string(self, emit: Emit) -> Reading[None]:
        yield from self.expect('"')
        emit('"')
        while self.current != '"':
            if not self.current:
                raise Malformed
            if self.current == "\\":
                yield from self.escape(emit)
            else:
                emit(escaped(self.current))
                yield
        yield from self.expect('"')
        emit('"')

    def escape(self, emit: Emit) -> Reading[None]:
        yield
        if self.current and self.current in ESCAPED:
            emit("\\" + self.current)
            yield
            return
        yield from self.expect("u")
        emit("\\u" + (yield from self.hexadecimal(4)))

    def hexadecimal(self, count: int) -> Reading[str]:
        digits = ""
        while len(digits) < count:
            if not self.current or self.current not in "0123456789abcdefABCDEF":
                raise Malformed
            digits += self.current
            yield
        return digits

    def number(self, emit: Emit) -> Reading[None]:
        emit(checked_number((yield from self.number_text())))

    def number_text(self) -> Reading[str]:
        letters: list[str] = []
        while self.current and self.current in "+-.0123456789eE":
            letters.append(self.current)
            yield
        return "".join(letters)

    def key(self) -> Reading[str]:
        """A string's own characters."""
        parts: list[str] = []
        yield from self.string(parts.append)
        return str(json.loads("".join(parts)))

    def call_object(self, is_known: IsKnown) -> Reading[None]:
        """``{"name": ..., "arguments": {...}}`` in any order, ``parameters`` as well; arguments
        that come before the name wait for it."""
        name: str | None = None
        early: str | None = None
        has_begun = False
        yield from self.expect("{")
        yield from self.blanks()
        while True:
            key = yield from self.key()
            yield from self.colon()
            if key == "name" and name is None:
                name = yield from self.name(is_known)
            elif key in ARGUMENT_KEYS and not has_begun and early is None:
                if name is None:
                    early = yield from self.held_arguments()
                else:
                    has_begun = True
                    yield from self.arguments(name)
            elif key in OTHER_KEYS:
                yield from self.value(ignore)
            else:
                raise Malformed
            yield from self.blanks()
            if self.current != ",":
                break
            yield from self.comma(ignore)
        if name is None or self.current != "}":
            raise Malformed
        if not has_begun:
            self.say_call(name, early or "{}")
        yield

    def name(self, is_known: IsKnown) -> Reading[str]:
        name = yield from self.key()
        if not name or not is_known(name):
            raise Malformed
        return name

    def say_call(self, name: str, arguments: str) -> None:
        self.begin_call(name)
        self.say_arguments(arguments)
        self.end_arguments()

    def arguments(self, name: str) -> Reading[None]:
        """An object, said as it comes; or what ``held_arguments`` reads."""
        if self.current == "{":
            self.begin_call(name)
            yield from self.object(self.say_arguments)
            self.end_arguments()
        else:
            self.say_call(name, (yield from self.held_arguments()))

    def held_arguments(self) -> Reading[str]:
        """An object, an object in a string, or null for none."""
        parts: list[str] = []
        yield from self.value(parts.append)
        text = "".join(parts)
        if text.startswith('"'):
            text = str(json.loads(text))
        found = "{}" if text == "null" else whole_object(text)
        if found is None:
            raise Malformed
        return found


def parse_arguments(text: str) -> Any:
    """Arguments a client sends back in a history: an object where they are one, else the text."""
    try:
        value = msgspec.json.decode(text or "{}")
    except (msgspec.MsgspecError, RecursionError, UnicodeError):
        return text
    return value if isinstance(value, dict) else text


class BareCallScanner(JsonScanner):
    """Calls without a mark, told from other text by the names of the functions there are."""

    def __init__(
        self,
        names: Collection[str],
        *,
        most_calls: int | None = None,
        make_id: Callable[[], str] = make_call_id,
    ) -> None:
        self._names = names
        super().__init__(most_calls=most_calls, make_id=make_id)

    def is_known(self, name: str) -> bool:
        return name in self._names
