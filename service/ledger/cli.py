"""``pronk usage``: from flags to a report."""

from __future__ import annotations

import os
import re
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

from service.ledger import show
from service.ledger.location import NONE, find_path
from service.ledger.record import Record
from service.ledger.report import By, Range, Unreadable, records, summarize

UNITS = {"m": 60, "h": 3600, "d": 86_400}
AGO = re.compile(r"(\d{1,6})([mhd])")
EACH = "request"


class UsageProblem(RuntimeError):
    """Why there is no report, in one line."""


@dataclass(frozen=True)
class UsageSettings:
    ledger: str | None = None
    since: str | None = None
    until: str | None = None
    key: str | None = None
    by: str = "key"
    csv: str | None = None
    json: bool = False


def report_usage(settings: UsageSettings) -> None:
    """Raises ``UsageProblem``."""
    within = Range(_moment(settings.since, "since"), _moment(settings.until, "until"), settings.key)
    try:
        _report(settings, _path(settings.ledger), within)
        sys.stdout.flush()
    except (
        BrokenPipeError
    ):  # as of `| head`: nobody reads on, the interpreter's last flush included
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (Unreadable, OSError) as error:
        raise UsageProblem(str(error)) from None


def _path(ledger: str | None) -> Path:
    if ledger == NONE:
        raise UsageProblem("--ledger names the file to report on, and none is no file")
    try:
        return find_path(ledger)
    except RuntimeError as error:
        raise UsageProblem(f"{error}; give --ledger FILE") from None


def _report(settings: UsageSettings, path: Path, within: Range) -> None:
    if settings.by == EACH:
        if settings.csv is None and not settings.json:
            raise UsageProblem("single requests are many lines: add --csv FILE, --csv - or --json")
        columns, rows = Record._fields, show.dated(records(path, within))
        if settings.csv is not None:
            return show.write_csv(columns, rows, settings.csv)
        return show.write_json(columns, rows)
    report = summarize(path, cast(By, settings.by), within)
    if settings.csv is not None:
        return show.write_csv(report.columns, report.rows, settings.csv)
    if settings.json:
        return show.write_json(report.columns, report.rows)
    return show.print_table(report, f"Usage by {settings.by}, {path}")


def _moment(text: str | None, flag: str) -> float | None:
    """An ISO date or time (UTC where it says no zone), or so long ago: 30m, 24h, 7d."""
    if text is None:
        return None
    if ago := AGO.fullmatch(text):
        return time.time() - int(ago[1]) * UNITS[ago[2]]
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise UsageProblem(
            f"--{flag} is a date or time such as 2026-11-01 or 2026-11-01T12:00, or 30m, 24h, 7d "
            f"ago, not {text!r:.80}"
        ) from None
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()
