"""A report for people (a table), spreadsheets (CSV) and programs (JSON)."""

from __future__ import annotations

import csv
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.table import Table

from service.ledger.record import Record
from service.ledger.report import Report

SHOWN = {  # of the sums, in a table, and their headings
    "requests": "requests",
    "error": "failed",
    "cancelled": "cancelled",
    "rejected": "rejected",
    "prompt_tokens": "prompt",
    "cached_tokens": "cached",
    "generated_tokens": "generated",
    "discarded_tokens": "discarded",
    "total_seconds": "seconds",
    "energy_joules": "joules",
}
MOST_WIDTH = 500  # columns
NOBODY = "(no key)"
UNKNOWN = "(not known)"  # refused before a model was found
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what spreadsheets run when a cell begins with it


def print_table(report: Report, title: str) -> None:
    sums = dict(zip(report.columns[len(report.labels) :], report.total, strict=True))
    shown = [name for name in SHOWN if name != "energy_joules" or sums[name] is not None]
    table = Table(title=title, title_justify="left")
    table.add_column(report.labels[-1].removeprefix("key_"), overflow="fold")
    for name in shown:
        table.add_column(SHOWN[name], justify="right", no_wrap=True)
    for row in report.rows:
        known = dict(zip(report.columns, row, strict=True))
        table.add_row(_label(report, row), *(_figure(known[name]) for name in shown))
    table.add_section()
    table.add_row("all", *(_figure(sums[name]) for name in shown))
    console = Console()
    needed = Console(width=MOST_WIDTH).measure(table).maximum
    console.width = max(console.width, needed)  # figures are never cut
    console.print(table, markup=False)
    for note in report.notes:
        print(note, file=sys.stderr)


def _label(report: Report, row: Sequence[object]) -> str:
    """The last label that is known: a key's name before its id, an adapter before its model."""
    known = [str(value) for value in row[: len(report.labels)] if value]
    return known[-1] if known else NOBODY if report.labels[-1] == "key_name" else UNKNOWN


def _figure(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:,.1f}" if isinstance(value, float) else f"{value:,}"


def write_csv(columns: Sequence[str], rows: Iterable[Sequence[object]], target: str) -> None:
    """To a file, which is replaced, or to standard output (``-``). Raises ``OSError``."""
    with _opened(target) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows([_cell(value) for value in row] for row in rows)


def _cell(value: object) -> object:
    """A name must stay text where a spreadsheet opens the file."""
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value


@contextmanager
def _opened(target: str) -> Iterator[TextIO]:
    if target == "-":
        yield sys.stdout
        return
    with Path(target).open("w", encoding="utf-8", newline="") as file:
        yield file


def write_json(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """An array of objects, written as it is read."""
    mark = "["
    for row in rows:
        print(mark, json.dumps(dict(zip(columns, row, strict=True))), sep="\n", end="")
        mark = ","
    print("\n]" if mark == "," else "[]")


def dated(records: Iterable[Record]) -> Iterator[Sequence[object]]:
    """With times that people can read: UTC, to the millisecond."""
    for record in records:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.time))
        yield (f"{seconds}.{int(record.time % 1 * 1000):03d}Z", *record[1:])
