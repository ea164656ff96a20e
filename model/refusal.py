"""A stranger's file is refused: always in one printable line, whatever it holds."""

from __future__ import annotations

_BEGINNING, _END = 700, 200  # characters kept of a longer message: what is wrong, what to do


class Refusal(ValueError):
    """What a file asks for cannot be served; names and values from it may stand in the message."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def one_line(message: str) -> str:
    """Line breaks, terminal escapes and lone surrogates spelled out, and not without end."""
    if len(message) > _BEGINNING + _END:
        message = f"{message[:_BEGINNING]} ... {message[-_END:]}"
    if message.isprintable():
        return message
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in message
    )
