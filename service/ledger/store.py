"""The ledger's SQLite file: records are appended in batches, old ones become daily sums.

Every method may raise ``sqlite3.Error``; a batch is written whole or not at all. Several servers
may share a file on a local disk: SQLite's locks order their batches.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from service.ledger import schema
from service.ledger.record import FINISHES, SUMMED, Record

DAY = 86_400.0
BUSY_SECONDS = 1.0  # waited for another process's transaction
LOCK_SECONDS = 10.0  # ... and for one that opens the file
ROWS_AT_ONCE = 200  # in one INSERT: the interpreter lock changes hands once for all of them
FOLD_AT_ONCE = 5_000  # records in one transaction
KEPT_DAYS = 1_100  # daily sums: three years
WAL_BYTES = 16 << 20
KEPT_STATEMENTS = 8  # compiled; of Python's 128 the INSERTs of as many sizes take 60 MiB

Numbered = tuple[int, Record]  # a server's own number of it


class Store:
    """Opened, or raises ``NotALedger``, ``OSError`` or ``sqlite3.Error``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.moved_to: Path | None = None  # where a damaged file of that name lies now
        with suppress(schema.Damaged):
            schema.identify(path)  # beside another program's file not even a lock is left
        with _lock(path):
            self._connection = self._open()

    def _open(self) -> sqlite3.Connection:
        try:
            return _connect(self.path)
        except schema.Damaged:
            self.moved_to = move_aside(self.path)
            return _connect(self.path)

    def close(self) -> None:
        self._connection.close()

    def check(self) -> str | None:
        """What is wrong with the file, all of it read; None is nothing."""
        try:
            found = self._connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):
                raise
            return str(error)
        return None if found == "ok" else str(found).partition("\n")[0]

    def replace_damaged(self) -> Path:
        """Move the file aside and begin a new one."""
        self.close()
        with _lock(self.path):
            moved = move_aside(self.path)
            self._connection = _connect(self.path)
        return moved

    def append(self, server: str, batch: Sequence[Numbered]) -> None:
        """One transaction."""
        with self._transaction():
            for start in range(0, len(batch), ROWS_AT_ONCE):
                rows = batch[start : start + ROWS_AT_ONCE]
                values: list[object] = []
                for number, record in rows:
                    values += (server, number, *record)
                self._connection.execute(_insert(len(rows)), values)

    def fold(self, max_records: int, max_days: float, now: float | None = None) -> int:
        """Makes daily sums of records that are too many or too old; how many, 0 at the end."""
        now = time.time() if now is None else now
        first, last = self._connection.execute("SELECT min(id), max(id) FROM records").fetchone()
        if first is None:
            return 0
        end = last - max_records  # ids have no gaps worth speaking of
        row = self._connection.execute("SELECT time FROM records WHERE id = ?", (first,)).fetchone()
        oldest = now - max_days * DAY
        if first > end and row[0] >= oldest:
            return 0
        where = "id < ? AND (id <= ? OR time < ?)"
        which = (first + FOLD_AT_ONCE, end, oldest)
        with self._transaction():
            self._connection.execute(fold_statement(where), which)
            found = self._connection.execute(f"DELETE FROM records WHERE {where}", which).rowcount
            last_day = time.strftime("%Y-%m-%d", time.gmtime(now - KEPT_DAYS * DAY))
            self._connection.execute("DELETE FROM days WHERE day < ?", (last_day,))
        return found

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise


def _insert(num_rows: int) -> str:
    row = f"({', '.join('?' * (2 + len(Record._fields)))})"
    columns = f"server, sequence, {', '.join(Record._fields)}"
    return f"INSERT INTO records ({columns}) VALUES {', '.join([row] * num_rows)}"


def _counted(finish: str) -> str:
    return f"sum(finish = '{finish}')"


SUMS_OF_RECORDS = ", ".join(
    ["count(*)", *map(_counted, FINISHES), *(f"sum({name})" for name in SUMMED)]
)
_GROUP = ", ".join(schema.GROUP)
# NULL is unknown: it stays so where nothing was known, and is left out of a sum otherwise.
_ADDED = ", ".join(
    f"{name} = CASE WHEN {name} IS NULL THEN excluded.{name}"
    f" ELSE {name} + coalesce(excluded.{name}, 0) END"
    for name in schema.SUMS
)


def fold_statement(where: str) -> str:
    return (
        f"INSERT INTO days (day, {_GROUP}, {', '.join(schema.SUMS)})"
        f" SELECT date(time, 'unixepoch'), {_GROUP}, {SUMS_OF_RECORDS} FROM records"
        f" WHERE {where} GROUP BY 1, {_GROUP} ON CONFLICT DO UPDATE SET {_ADDED}"
    )


def _connect(path: Path) -> sqlite3.Connection:
    """Raises ``NotALedger``, ``Damaged``, ``OSError`` or ``sqlite3.OperationalError``."""
    kind = schema.identify(path)
    if kind == "new":  # SQLite gives its own files beside it the same mode
        os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
    connection = sqlite3.connect(
        path,
        timeout=BUSY_SECONDS,
        isolation_level=None,
        check_same_thread=False,
        cached_statements=KEPT_STATEMENTS,
    )
    try:
        if kind == "new":
            schema.create(connection)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute(f"PRAGMA journal_size_limit = {WAL_BYTES}")
        connection.execute("SELECT id FROM records LIMIT 1").fetchone()
        connection.execute("SELECT day FROM days LIMIT 1").fetchone()
    except sqlite3.OperationalError as error:
        connection.close()
        if "no such table" in str(error):
            raise schema.Damaged(str(error)) from None
        raise
    except sqlite3.DatabaseError as error:
        connection.close()
        raise schema.Damaged(str(error)) from None
    except BaseException:
        connection.close()
        raise
    return connection


def move_aside(path: Path) -> Path:
    """With what SQLite keeps beside it, which belongs to no other file."""
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    target = path.with_name(f"{path.name}.damaged-{stamp}")
    number = 1
    while target.exists():
        number += 1
        target = path.with_name(f"{path.name}.damaged-{stamp}-{number}")
    for suffix in ("-wal", "-shm", ""):
        beside = path.with_name(path.name + suffix)
        if beside.exists():
            beside.rename(target.with_name(target.name + suffix))
    return target


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One process at a time opens, makes or moves it."""
    descriptor = os.open(f"{path}.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    with closing(os.fdopen(descriptor, "w")) as file:
        give_up = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > give_up:
                    raise OSError(f"another process keeps {path}.lock") from None
                time.sleep(0.02)
        yield
