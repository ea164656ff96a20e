"""What holds a request's words or an answer's prints as what it is, never as what it holds.

``repr``, ``str``, f-strings, ``%s``, a dataclass around it, a debugger's or a log's list of locals:
all of them end in ``__repr__``. So it is the records that are closed, not the strings in them: a
kind of string of its own would be a plain one again after the first slice, join or decode, and
those are made for every token.
"""

from __future__ import annotations

from typing import Any, ClassVar, NoReturn


class Redacted:
    """Mixed in first, before ``Struct`` or ``BaseModel``; a dataclass also says ``repr=False``.

    ``printed`` names the fields that are nobody's words. Pickles and deep copies are refused: they
    would take the words where nothing of this holds.
    """

    __slots__ = ()
    printed: ClassVar[tuple[str, ...]] = ()

    def __repr__(self) -> str:
        return redacted(self, self.printed)

    def __str__(self) -> str:
        return redacted(self, self.printed)

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return []

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(f"{type(self).__name__} holds what a client or the model said: not pickled")


def redacted(record: object, printed: tuple[str, ...] = ()) -> str:
    """``<Submit id=3, redacted>``."""
    told = [f"{name}={getattr(record, name, None)!r}" for name in printed]
    return f"<{' '.join([type(record).__name__, *told])}, redacted>"
