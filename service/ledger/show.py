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

SHOWN = {  # of the sums, in a table
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
NOBODY = "(no key)"
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what spreadsheets run when a cell begins with it


def print_table(report: Report, title: str) -> None:
    table = Table(title=title, title_justify="left")
    for label in report.labels:
        table.add_column(label.replace("_", " "), overflow="fold")
    for heading in SHOWN.values():
        table.add_column(heading, justify="right")
    width = len(report.labels)
    for row in report.rows:
        labels = [_label(name, row) for name, row in zip(report.labels, row, strict=False)]
        table.add_row(*labels, *_figures(report, row[width:]))
    table.add_section()
    table.add_row("all", *[""] * (width - 1), *_figures(report, report.total))
    Console().print(table, markup=False)
    for note in report.notes:
        print(note, file=sys.stderr)


def _label(name: str, value: object) -> str:
    text = str(value or "")
    return text or (NOBODY if name == "key_name" else "-")


def _figures(report: Report, sums: Sequence[object]) -> Iterator[str]:
    known = dict(zip(report.columns[len(report.labels) :], sums, strict=True))
    for name in SHOWN:
        value = known[name]
        if value is None:
            yield "-"
        else:
            yield f"{value:,.1f}" if isinstance(value, float) else f"{value:,}"


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
