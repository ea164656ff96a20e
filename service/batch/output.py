"""The output of a batch: a record a line, appended as answers come, and read to go on after a stop.

A line is written whole or was cut by the end of the process; the latter is taken off again.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import msgspec
from msgspec import Raw, Struct

from service.batch.problem import BatchProblem
from service.batch.requests import BatchRequest, Refused
from service.redaction import Redacted

OPENING = b'{"id":"batch_req_'  # of every record: what begins otherwise is somebody's other file


class Response(Redacted, Struct):
    status_code: int
    request_id: str
    body: Raw


class Failure(Redacted, Struct):
    """Why a line has no response. ``line`` is its number in the input, from 1."""

    code: str
    message: str
    param: str | None
    line: int


class Record(Redacted, Struct):
    id: str
    custom_id: str | None
    response: Response | None = None
    error: Failure | None = None

    @property
    def is_answered(self) -> bool:
        return self.response is not None and self.response.status_code < 400


def record(
    line: BatchRequest | Refused, response: Response | None, error: Failure | None
) -> Record:
    return Record(f"batch_req_{secrets.token_hex(12)}", line.custom_id, response, error)


class Output:
    """The records there are, and room for more. One process at a time has it open."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.num_before = 0  # records of earlier runs
        self.num_failed_before = 0
        self._file = file
        self.path = path
        self._ids: set[str] = set()
        self._numbers: set[int] = set()  # lines whose record is an error of the line's own

    def has(self, line: BatchRequest | Refused) -> bool:
        """Whether an earlier run wrote this line's record."""
        if isinstance(line, BatchRequest):
            return line.custom_id in self._ids
        return line.number in self._numbers

    def append(self, entry: Record) -> None:
        """In one write. Raises ``BatchProblem`` when the disk does not take it."""
        try:
            self._file.write(_encoder.encode(entry) + b"\n")
            self._file.flush()
        except OSError as error:
            raise BatchProblem(f"cannot write {self.path}: {error.strerror}") from None

    def note(self, entry: Record) -> None:
        self.num_before += 1
        self.num_failed_before += not entry.is_answered
        if entry.error is not None:
            self._numbers.add(entry.error.line)
        if entry.custom_id is not None and (
            entry.error is None or entry.error.code != "duplicate_custom_id"
        ):
            self._ids.add(entry.custom_id)


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Record)


@contextlib.contextmanager
def open_output(path: Path, *, again: bool = False) -> Iterator[Output]:
    """``again``: records of what failed are taken out, so that those lines run once more.

    Raises ``BatchProblem`` for a file that is not a batch's, or is being written to.
    """
    try:
        with _opened(path, again) as (file, found):
            yield found
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise BatchProblem(f"cannot write {path}: {error.strerror}") from None


@contextlib.contextmanager
def _opened(path: Path, again: bool) -> Iterator[tuple[BinaryIO, Output]]:
    with contextlib.ExitStack() as stack:
        file: BinaryIO = stack.enter_context(path.open("a+b"))
        _lock(file, path)
        found = Output(file, path)
        kept: list[bytes] | None = [] if again else None
        end = _read(file, found, kept)
        if kept is not None and len(kept) != _count(file, end):
            file = stack.enter_context(_rewritten(path, kept))
            found = Output(file, path)
            end = _read(file, found, None)
        file.truncate(end)
        file.seek(end)
        yield file, found


def _read(file: BinaryIO, found: Output, kept: list[bytes] | None) -> int:
    """Note every record, in ``kept`` only those that were answered; where the last one ends."""
    file.seek(0)
    end = 0
    for number, line in enumerate(file, 1):
        if not line.endswith(b"\n"):
            if not line.startswith(OPENING[: len(line)]):
                raise _foreign(found.path, number)
            break
        entry = _parse(line, number, found)
        found.note(entry)
        if kept is not None and entry.is_answered:
            kept.append(line)
        end += len(line)
    return end


def _parse(line: bytes, number: int, found: Output) -> Record:
    try:
        if line.startswith(OPENING):
            return _decoder.decode(line)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        pass
    raise _foreign(found.path, number)


def _foreign(path: Path, number: int) -> BatchProblem:
    return BatchProblem(
        f"{path} is there already and its line {number} is not a batch's record: "
        "give another output"
    )


def _count(file: BinaryIO, end: int) -> int:
    file.seek(0)
    return file.read(end).count(b"\n")


@contextlib.contextmanager
def _rewritten(path: Path, lines: list[bytes]) -> Iterator[BinaryIO]:
    """A new file in place of the old one, whole before it takes its name."""
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with fresh.open("x+b") as file:
        _lock(file, path)
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
        fresh.replace(path)
        yield file


def _lock(file: BinaryIO, path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BatchProblem(f"another run is writing to {path}") from None
    except OSError:
        return  # a file system without locks
