"""What the ledger says: sums by key, model, day or hour, and single records. Reads only."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from service.ledger import schema
from service.ledger.record import Record
from service.ledger.store import BUSY_SECONDS, SUMS_OF_RECORDS

By = Literal["key", "model", "day", "hour"]
LABELS: dict[By, tuple[str, ...]] = {
    "key": ("key_id", "key_name"),
    "model": ("model", "adapter"),
    "day": ("day",),
    "hour": ("hour",),
}
# How a record and a day's sums tell each label; sums of days know no hour.
OF_RECORD = {
    "day": "date(time, 'unixepoch')",
    "hour": "strftime('%Y-%m-%dT%H:00Z', time, 'unixepoch')",
}
CHARGED = "prompt_tokens + generated_tokens + discarded_tokens"
NEXT_DAY = "date(day, '+1 day')"


class Unreadable(Exception):
    """There is no ledger to report on; the text says why in one line."""


@dataclass(frozen=True)
class Range:
    """Records that ended in [since, until), of one key (its name or id) or of all."""

    since: float | None = None  # seconds since the epoch
    until: float | None = None
    key: str | None = None

    def of_records(self) -> tuple[str, list[object]]:
        terms: list[tuple[str, object]] = []
        if self.since is not None:
            terms.append(("time >= ?", self.since))
        if self.until is not None:
            terms.append(("time < ?", self.until))
        return self._where(terms)

    def of_days(self) -> tuple[str, list[object]]:
        """Days that lie in it whole."""
        terms: list[tuple[str, object]] = []
        if self.since is not None:
            terms.append(("day >= ?", _day_after(self.since)))
        if self.until is not None:
            terms.append((f"{NEXT_DAY} <= ?", _day(self.until)))
        return self._where(terms)

    def of_cut_days(self) -> tuple[str, list[object]]:
        """Days of which a part lies in it."""
        bounds = (self.since, self.until)
        days = [_day(bound) for bound in bounds if bound is not None and bound % 86_400]
        where, values = self._where([])
        return f"{where} AND day IN ({', '.join('?' * len(days))})", [*values, *days]

    def _where(self, terms: list[tuple[str, object]]) -> tuple[str, list[object]]:
        clauses, values = [term for term, _ in terms], [value for _, value in terms]
        if self.key is not None:
            clauses.append("(key_name = ? OR key_id = ?)")
            values += [self.key, self.key]
        return " AND ".join(clauses or ["1"]), values


@dataclass(frozen=True)
class Report:
    """``rows``: labels, then ``schema.SUMS``; ``total``: the sums over all of them."""

    labels: tuple[str, ...]
    rows: list[tuple[object, ...]]
    total: tuple[object, ...]
    notes: list[str] = field(default_factory=list)

    @property
    def columns(self) -> tuple[str, ...]:
        return (*self.labels, *schema.SUMS)


def summarize(path: Path, by: By, within: Range) -> Report:
    with reading(path) as connection:
        labels = LABELS[by]
        rows = connection.execute(*_grouped(by, labels, within)).fetchall()
        sums = connection.execute(*_grouped(by, (), within))
        total = sums.fetchone() if rows else None
        notes = _notes(connection, by, within)
    return Report(labels, rows, total or (0,) * len(schema.SUMS), notes)


def records(path: Path, within: Range) -> Iterator[Record]:
    """One by one, in the order they were written."""
    where, values = within.of_records()
    with reading(path) as connection:
        columns = ", ".join(Record._fields)
        for row in connection.execute(
            f"SELECT {columns} FROM records WHERE {where} ORDER BY id", values
        ):
            yield Record(*row)


def charged_since(path: Path, key_id: str, since: float, server: str, first: int) -> int:
    """Tokens of a key, without what ``server`` wrote from its record number ``first`` on.

    For a process that has the ledger open: the file is not identified again. Closing a file gives
    up every lock the process has on it, SQLite's too; then whoever else closes the ledger would
    take himself for the last and remove the journal that this process goes on writing to.
    """
    with _connected(path) as connection:
        [recent] = connection.execute(
            f"SELECT coalesce(sum({CHARGED}), 0) FROM records WHERE key_id = ? AND time >= ?"
            " AND NOT (server = ? AND sequence >= ?)",
            (key_id, since, server, first),
        ).fetchone()
        [older] = connection.execute(
            f"SELECT coalesce(sum({CHARGED}), 0) FROM days WHERE key_id = ? AND day >= ?",
            (key_id, _day(since)),
        ).fetchone()
    return int(recent + older)


@contextmanager
def reading(path: Path) -> Iterator[sqlite3.Connection]:
    """One view of the file, whatever is written meanwhile. Raises ``Unreadable``.

    Not for a process that writes to it: see ``charged_since``.
    """
    try:
        if schema.identify(path) == "new":
            raise Unreadable(f"there is no usage ledger at {path}")
    except (schema.NotALedger, schema.Damaged) as error:
        raise Unreadable(f"{path} cannot be read as a usage ledger: {error}") from None
    except OSError as error:
        raise Unreadable(f"cannot read the usage ledger {path}: {error.strerror}") from None
    with _connected(path) as connection:
        yield connection


@contextmanager
def _connected(path: Path) -> Iterator[sqlite3.Connection]:
    try:
        uri = f"{path.absolute().as_uri()}?mode=ro"
        with closing(
            sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS, isolation_level=None)
        ) as connection:
            connection.execute("BEGIN")
            yield connection
    except sqlite3.Error as error:
        raise Unreadable(f"cannot read the usage ledger {path}: {error}") from None


def _grouped(by: By, labels: tuple[str, ...], within: Range) -> tuple[str, list[object]]:
    """Records and the days that are left of older ones, added up by ``labels``."""
    named = [f"{OF_RECORD.get(label, label)} AS {label}" for label in labels]
    group = f"GROUP BY {', '.join(map(str, range(1, len(labels) + 1)))}" if labels else ""
    where, values = within.of_records()
    sources = [
        f"SELECT {', '.join([*named, *_named_sums()])} FROM records WHERE {where}"
        f" {group or 'HAVING count(*)'}"
    ]
    if by != "hour":
        where, more = within.of_days()
        sources.append(f"SELECT {', '.join([*labels, *schema.SUMS])} FROM days WHERE {where}")
        values = [*values, *more]
    sums = [f"sum({name})" for name in schema.SUMS]
    union = " UNION ALL ".join(sources)
    order = f"ORDER BY {', '.join(labels)}" if labels else ""
    return f"SELECT {', '.join([*labels, *sums])} FROM ({union}) {group} {order}", values


def _named_sums() -> list[str]:
    return [
        f"{sum_} AS {name}"
        for sum_, name in zip(SUMS_OF_RECORDS.split(", "), schema.SUMS, strict=True)
    ]


def _notes(connection: sqlite3.Connection, by: By, within: Range) -> list[str]:
    where, values = within.of_days() if by == "hour" else within.of_cut_days()
    [count] = connection.execute(
        f"SELECT count(DISTINCT day) FROM days WHERE {where}", values
    ).fetchone()
    if not count:
        return []
    why = "have no hours" if by == "hour" else "lie in the time asked for only in part"
    return [f"Left out: {count} days whose records are kept as daily sums, which {why}."]


def _day(moment: float) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(moment))


def _day_after(moment: float) -> str:
    """The first day that begins at ``moment`` or later."""
    return _day(moment if moment % 86_400 == 0 else moment + 86_400)
