"""The ledger's tables, and whether a file holds them, is damaged or belongs to somebody else."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Literal

from service.ledger.record import FINISHES, REALS, SUMMED, TEXTS, Record

APPLICATION_ID = 0x70726E6B  # "prnk", in the file's header
VERSION = 1
HEADER_BYTES = 100
MAGIC = b"SQLite format 3\0"

GROUP = ("key_id", "key_name", "model", "adapter")  # whose sums are kept apart
COUNTS = ("requests", *FINISHES)
SUMS = (*COUNTS, *SUMMED)


def _type(name: str) -> str:
    return "TEXT" if name in TEXTS else "REAL" if name in REALS else "INTEGER"


def _columns(names: tuple[str, ...]) -> str:
    return ", ".join(f"{name} {_type(name)}" for name in names)


SCHEMA = (
    # ``server`` and ``sequence`` name a record: a gap in a server's numbers is a record that was
    # lost.
    "CREATE TABLE records (id INTEGER PRIMARY KEY, server TEXT NOT NULL,"
    f" sequence INTEGER NOT NULL, {_columns(Record._fields)})",
    "CREATE INDEX records_by_key ON records (key_id, time)",
    "CREATE TRIGGER records_are_final BEFORE UPDATE ON records"
    " BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END",
    f"CREATE TABLE days (day TEXT, {_columns(GROUP)}, {_columns(SUMS)},"
    f" PRIMARY KEY (day, {', '.join(GROUP)})) WITHOUT ROWID",
)


class NotALedger(Exception):
    """The file is another program's, or a newer pronk's: it was not touched."""


class Damaged(Exception):
    """A ledger, and no longer readable as one."""


Kind = Literal["new", "ledger"]


def identify(path: Path) -> Kind:
    """By its header, read as bytes: SQLite itself would write to what it opens.

    Not where this process has it open: closing it gives up SQLite's locks. Raises ``NotALedger`` or
    ``Damaged``.
    """
    try:
        with path.open("rb") as file:
            header = file.read(HEADER_BYTES)
    except FileNotFoundError:
        return "new"
    if not header:
        return "new"
    if not header.strip(b"\0"):  # what a file system may leave of a file after a power cut
        raise Damaged("it holds nothing but zeros")
    if not header.startswith(MAGIC):
        raise NotALedger("it is no SQLite file")
    if len(header) < HEADER_BYTES:
        raise Damaged("it was cut short")
    version, application = (int.from_bytes(header[at : at + 4], "big") for at in (60, 68))
    if application != APPLICATION_ID:
        raise NotALedger("it is another program's database")
    if version != VERSION:
        raise NotALedger(f"it has version {version}, and this pronk reads version {VERSION}")
    return "ledger"


def create(connection: sqlite3.Connection) -> None:
    """All in one transaction and before WAL, so that the file's header always says what it is."""
    connection.execute("BEGIN EXCLUSIVE")
    for statement in SCHEMA:
        connection.execute(statement)
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    connection.execute(f"PRAGMA user_version = {VERSION}")
    connection.execute("COMMIT")
