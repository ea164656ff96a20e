"""`pronk usage`: sums that add up, in a table, as CSV and as JSON."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from typer.testing import CliRunner

from service.cli import app
from service.ledger.location import default_path
from service.ledger.record import Record
from service.ledger.report import Range, summarize
from service.ledger.store import Store
from tests.ledger.samples import DAY, NOON, sample


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    """Four days at noon: two requests of ann's and one of ben's each."""
    path = tmp_path / "u.db"
    found = []
    for day in range(4):
        when = NOON + day * DAY
        found += [sample(day, time=when), sample(10 + day, time=when + 3_600, finish="error")]
        ben = {"key_id": "k2", "key_name": "ben", "adapter": "tuned", "energy_joules": 1.5}
        found.append(sample(20 + day, time=when, **ben))
    with closing(Store(path)) as store:
        store.append("a", list(enumerate(found, start=1)))
    return path


def usage(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["usage", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["usage", *arguments])
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit), "no traceback"
    return result.stderr


def rows(*arguments: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(usage(*arguments, "--csv", "-"))))


def test_requests_and_tokens_add_up_by_key(ledger: Path) -> None:
    ann, ben = rows("--ledger", str(ledger))
    assert (ann["key_name"], ann["requests"], ann["error"]) == ("ann", "8", "4")
    assert (ann["prompt_tokens"], ann["generated_tokens"]) == ("80", "40")
    assert (ben["key_name"], ben["requests"], ben["energy_joules"]) == ("ben", "4", "6.0")


@pytest.mark.parametrize(
    ("by", "label", "values"),
    [
        ("model", "adapter", ["", "tuned"]),
        ("day", "day", [f"2026-01-0{day}" for day in range(1, 5)]),
        (
            "hour",
            "hour",
            [f"2026-01-0{day}T{hour}:00Z" for day in range(1, 5) for hour in (12, 13)],
        ),
    ],
)
def test_every_grouping_has_the_same_total(
    ledger: Path, by: str, label: str, values: list[str]
) -> None:
    found = rows("--ledger", str(ledger), "--by", by)
    assert [row[label] for row in found] == values
    assert sum(int(row["generated_tokens"]) for row in found) == 12 * 5


@pytest.mark.parametrize(
    ("bounds", "count"),
    [
        (["--since", "2026-01-02"], 9),
        (["--until", "2026-01-02"], 3),
        (["--since", "2026-01-01T12:30", "--until", "2026-01-02T12:30"], 3),
        (["--since", "2026-01-04T14:00:00+01:00"], 1),
        (["--since", "1h"], 0),
        (["--key", "ben"], 4),
        (["--key", "k1", "--since", "2026-01-04"], 2),
    ],
)
def test_a_range_takes_what_ended_in_it(ledger: Path, bounds: list[str], count: int) -> None:
    found = rows("--ledger", str(ledger), *bounds)
    assert sum(int(row["requests"]) for row in found) == count
    each = rows("--ledger", str(ledger), "--by", "request", *bounds)
    assert len(each) == count


def test_days_kept_as_sums_count_where_they_lie_whole_in_the_range(ledger: Path) -> None:
    with closing(Store(ledger)) as store:
        store.fold(3, 10_000, now=NOON)

    def count(since: str | None, until: str | None = None) -> tuple[object, list[str]]:
        bounds = [
            None if day is None else NOON + (float(day) - 1.5) * DAY for day in (since, until)
        ]
        report = summarize(ledger, "key", Range(*bounds))
        return report.total[0], report.notes

    assert count(None) == (12, [])
    assert count("1", "3") == (6, [])
    assert count("2") == (9, [])
    total, notes = count("1.25", "3")
    assert total == 3, "of the first day no part is known"
    assert "1 days" in notes[0]
    hours = summarize(ledger, "hour", Range())
    assert hours.total[0] == 3
    assert "3 days" in hours.notes[0]


def test_single_requests_have_every_field(ledger: Path) -> None:
    found = rows("--ledger", str(ledger), "--by", "request")
    assert list(found[0]) == list(Record._fields)
    assert found[0]["time"] == "2026-01-01T12:00:00.000Z"
    told = json.loads(usage("--ledger", str(ledger), "--by", "request", "--json"))
    assert [one["request_id"] for one in told] == [one["request_id"] for one in found]
    assert told[0]["energy_joules"] is None


def test_json_and_csv_say_the_same(ledger: Path) -> None:
    told = json.loads(usage("--ledger", str(ledger), "--json"))
    assert [
        {name: "" if value is None else str(value) for name, value in one.items()} for one in told
    ] == rows("--ledger", str(ledger))
    assert json.loads(usage("--ledger", str(ledger), "--key", "nobody", "--json")) == []


def test_the_table_shows_names_and_the_total(ledger: Path) -> None:
    shown = usage("--ledger", str(ledger))
    assert "ann" in shown
    last = [line for line in shown.splitlines() if "all" in line][-1]
    assert "12" in last
    assert "120" in last, "prompt tokens"


def test_a_key_without_records_used_nothing(ledger: Path) -> None:
    assert "-" not in usage("--ledger", str(ledger), "--key", "nobody").splitlines()[-2]


def test_whoever_reads_only_the_beginning_sees_no_error(ledger: Path) -> None:
    command = [sys.executable, "-m", "service.cli", "usage", "--ledger", str(ledger), "--csv", "-"]
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer) as gone:
        ended = subprocess.run(command, stdout=gone, stderr=subprocess.PIPE, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, b"")


def test_csv_goes_to_a_file(ledger: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.csv"
    assert usage("--ledger", str(ledger), "--csv", str(target)) == ""
    assert target.read_text().splitlines()[0].startswith("key_id,key_name,requests,")
    assert "No such file" in refused("--ledger", str(ledger), "--csv", str(tmp_path / "no/dir.csv"))


def test_a_name_is_no_formula_where_a_spreadsheet_opens_it(tmp_path: Path) -> None:
    with closing(Store(tmp_path / "u.db")) as store:
        store.append("a", [(1, sample(key_name="=cmd()"))])
    [row] = rows("--ledger", str(tmp_path / "u.db"))
    assert row["key_name"] == "'=cmd()"


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("PRONK_LEDGER", raising=False)
    return


def test_what_cannot_be_reported_is_said_in_a_line(
    ledger: Path, tmp_path: Path, homeless: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "notes.txt"
    other.write_text("not a ledger at all")
    assert "no SQLite file" in refused("--ledger", str(other))
    assert "there is no usage ledger" in refused("--ledger", str(tmp_path / "nowhere"))
    assert "none is no file" in refused("--ledger", "none")
    assert "--since is a date" in refused("--ledger", str(ledger), "--since", "yesterday")
    assert "add --csv" in refused("--ledger", str(ledger), "--by", "request")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    assert str(tmp_path / "state/pronk/usage.db") in refused()
    assert default_path() == tmp_path / "state/pronk/usage.db"


def test_a_report_is_read_while_a_server_writes(ledger: Path) -> None:
    with closing(Store(ledger)) as store:
        store._connection.execute("BEGIN IMMEDIATE")
        assert summarize(ledger, "key", Range()).total[0] == 12
        store._connection.execute("ROLLBACK")
