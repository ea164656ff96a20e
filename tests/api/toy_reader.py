"""A toy dialect: ``(thought)``, ``[name:arguments]``, all else is content. Read as it grows."""

from __future__ import annotations

from service.api.reading import CallDelta, Delta


class ToyReader:
    """A name with a ``!`` in it shows that what looked like a call was none."""

    reasoning_length = 0

    def __init__(self) -> None:
        self.has_calls = False
        self._kind = "content"
        self._calls = -1
        self._name: str | None = None

    def push(self, text: str) -> Delta:
        delta = Delta()
        for character in text:
            delta += self._step(character)
        return delta

    def flush(self) -> Delta:
        return Delta()

    def _step(self, character: str) -> Delta:
        if self._kind == "content" and character in "([":
            self._kind = "reasoning" if character == "(" else "name"
            self._name = ""
        elif self._kind == "content":
            return Delta(content=character)
        elif character == (")" if self._kind == "reasoning" else "]"):
            self.has_calls |= self._kind == "arguments"
            self._kind = "content"
        elif self._kind == "reasoning":
            return Delta(reasoning=character)
        elif self._kind == "name" and character == ":":
            self._kind = "arguments"
            self._calls += 1
            return Delta(calls=[CallDelta(self._calls, f"call_{self._calls}", self._name)])
        elif self._kind == "name":
            self._name = f"{self._name}{character}"
        elif character == "!":
            self._kind = "content"
            return Delta(content="!", calls=[CallDelta(self._calls, is_broken=True)])
        else:
            return Delta(calls=[CallDelta(self._calls, arguments=character)])
        return Delta()
