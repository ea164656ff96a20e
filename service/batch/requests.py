"""The lines of a batch's input: each one a request, or what is wrong with it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import msgspec
from msgspec import Raw, Struct

from service.batch.problem import BatchProblem
from service.redaction import Redacted

ROUTES = frozenset(
    {
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/responses",
        "/v1/messages",
        "/v1/embeddings",
        "/v1/score",
        "/v1/rerank",
        "/tokenize",
        "/detokenize",
    }
)
LONGEST_ID = 512  # characters of a custom_id
ENVELOPE = 4096  # bytes a line may have beyond the body it carries
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True, repr=False)
class BatchRequest(Redacted):
    """``body`` is sent byte for byte as it stands in the line."""

    number: int  # of the line, from 1
    custom_id: str
    url: str
    body: bytes


@dataclass(frozen=True, slots=True, repr=False)
class Refused(Redacted):
    """A line that is sent nowhere. ``custom_id`` is None where none could be read."""

    number: int
    custom_id: str | None
    code: str
    message: str
    param: str | None = None


class _Line(Redacted, Struct):
    custom_id: str
    method: str
    url: str
    body: Raw


class _Named(Redacted, Struct):
    custom_id: str


class _Stream(Struct):
    stream: object = None


_line = msgspec.json.Decoder(_Line)
_named = msgspec.json.Decoder(_Named)
_stream = msgspec.json.Decoder(_Stream)


def read_requests(path: Path, max_body_bytes: int) -> Iterator[BatchRequest | Refused]:
    """Every line that is not blank. An id that came before is refused: answers would be mixed up.

    Raises ``BatchProblem`` where the file cannot be read.
    """
    seen: set[str] = set()
    try:
        with path.open("rb") as file:
            for number, line in enumerate(_bounded_lines(file, max_body_bytes + ENVELOPE), 1):
                if line is None:
                    most = f"a body of at most {max_body_bytes} bytes"
                    yield Refused(number, None, "line_too_long", f"A line carries {most}.")
                elif line.strip():
                    yield _unique(parse(number, line), seen)
    except OSError as error:
        raise BatchProblem(f"cannot read {path}: {error.strerror}") from None


def count_lines(path: Path) -> int:
    """How many there are at most, for a progress bar."""
    try:
        with path.open("rb") as file:
            count, last = 0, b"\n"
            while part := file.read(1 << 20):
                count += part.count(b"\n")
                last = part[-1:]
    except OSError as error:
        raise BatchProblem(f"cannot read {path}: {error.strerror}") from None
    return count + (last != b"\n")


def _bounded_lines(file: BinaryIO, most: int) -> Iterator[bytes | None]:
    """Lines without their ends; None for one that is longer, of which no more is kept."""
    is_first = True
    while line := file.readline(most):
        is_whole = line.endswith(b"\n") or len(line) < most
        while not line.endswith(b"\n") and (rest := file.readline(most)):
            is_whole, line = False, rest
        if is_first and is_whole:
            line = line.removeprefix(BYTE_ORDER_MARK)
        is_first = False
        yield line if is_whole else None


def parse(number: int, line: bytes) -> BatchRequest | Refused:
    try:
        found = _line.decode(line)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        is_json = isinstance(error, msgspec.ValidationError)
        code = "invalid_line" if is_json else "invalid_json"
        return Refused(number, _custom_id(line), code, f"The line cannot be read: {error}")
    problem = _problem(found)
    if problem is not None:
        code, message, param = problem
        kept = found.custom_id if 0 < len(found.custom_id) <= LONGEST_ID else None
        return Refused(number, kept, code, message, param)
    return BatchRequest(number, found.custom_id, found.url, bytes(found.body))


def _custom_id(line: bytes) -> str | None:
    """Of a line that is wrong elsewhere: its answer can then be found by it all the same."""
    try:
        found = _named.decode(line).custom_id
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    return found if 0 < len(found) <= LONGEST_ID else None


def _problem(line: _Line) -> tuple[str, str, str] | None:
    """(code, message, param)."""
    if not 0 < len(line.custom_id) <= LONGEST_ID:
        return ("invalid_custom_id", f"custom_id has 1 to {LONGEST_ID} characters.", "custom_id")
    if line.method != "POST":
        return ("invalid_method", "method must be POST.", "method")
    if line.url not in ROUTES:
        return ("invalid_url", f"url must be one of {', '.join(sorted(ROUTES))}.", "url")
    try:
        streams = _stream.decode(line.body).stream
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None  # the route says what is wrong with its body
    if streams:
        return ("stream_unsupported", "A batch has whole answers: leave stream out.", "body.stream")
    return None


def _unique(found: BatchRequest | Refused, seen: set[str]) -> BatchRequest | Refused:
    if found.custom_id is None:
        return found
    if found.custom_id in seen:
        message = "An earlier line has this custom_id."
        return Refused(found.number, found.custom_id, "duplicate_custom_id", message, "custom_id")
    seen.add(found.custom_id)
    return found
