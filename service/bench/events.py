"""Server-sent events of a completion, cut from bytes and read for what a benchmark needs."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
from msgspec import Raw, Struct

END = b"[DONE]"


class _Delta(Struct):
    content: str | None = None
    reasoning_content: str | None = None


class _Choice(Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None


class _PromptDetails(Struct):
    cached_tokens: int | None = None


class Usage(Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _PromptDetails | None = None

    @property
    def cached_tokens(self) -> int:
        return (self.prompt_tokens_details and self.prompt_tokens_details.cached_tokens) or 0


class Event(Struct):
    """A chunk of a completion or of a chat; fields it does not name are skipped, not built."""

    choices: list[_Choice] = []
    usage: Usage | None = None
    error: Raw = Raw()  # a structure with most servers, a text with some

    @property
    def has_text(self) -> bool:
        """Whether a reader would see something new: the role and the last chunk bring nothing."""
        for choice in self.choices:
            delta = choice.delta
            if choice.text or (delta and (delta.content or delta.reasoning_content)):
                return True
        return False

    @property
    def is_last(self) -> bool:
        return any(choice.finish_reason for choice in self.choices)

    @property
    def failure(self) -> str:
        """The error's message, "" where the event is none."""
        return "" if bytes(self.error) in (b"", b"null") else message_of(self.error)


read_event = msgspec.json.Decoder(Event).decode


class EventLines:
    """Bytes as they come, cut anywhere, to the data of each event."""

    def __init__(self) -> None:
        self._rest = b""

    def push(self, data: bytes) -> Iterator[bytes]:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()


def message_of(body: bytes | Raw) -> str:
    """What an error's body says, in whichever of the common shapes; its first bytes otherwise."""
    try:
        found = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        found = bytes(body).decode(errors="replace")
    for key in ("error", "message", "detail"):
        if isinstance(found, dict) and key in found:
            found = found[key]
    return str(found).strip()[:200]
