"""Where a server keeps its ledger, and what happens where it cannot."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from service.ledger.location import LedgerProblem, kept
from tests.ledger.samples import numbers, sample

BOUNDS = {"max_records": 100, "max_days": 10.0}


def test_the_default_is_a_folder_of_its_own_in_the_users_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    with kept(None, **BOUNDS) as ledger:
        assert ledger is not None
        ledger.add(sample())
    path = tmp_path / "state/pronk/usage.db"
    assert numbers(path) == [1]
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


@pytest.mark.parametrize("wanted", [None, ""])
def test_without_a_default_place_there_is_a_line_and_no_ledger(
    wanted: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/proc/nowhere")  # nobody can make a folder there
    with kept(wanted, **BOUNDS) as ledger:
        assert ledger is None
    [line] = caplog.records
    assert "usage is not recorded" in line.getMessage()
    assert "--ledger" in line.getMessage()


def test_a_ledger_asked_for_by_name_must_be_possible(tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("mine")
    for place, reason in (("/proc/nowhere/u.db", "No such file"), (str(notes), "no SQLite file")):
        with pytest.raises(LedgerProblem, match=reason), kept(place, **BOUNDS):
            raise AssertionError("opened")
    assert notes.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [notes]


def test_none_is_none_and_a_batch_keeps_one_only_where_it_is_named(tmp_path: Path) -> None:
    with kept("none", **BOUNDS) as ledger:
        assert ledger is None
    with kept(None, by_default=False, **BOUNDS) as ledger:
        assert ledger is None
    with kept(str(tmp_path / "u.db"), by_default=False, **BOUNDS) as ledger:
        assert ledger is not None


def test_a_damaged_file_is_told_of_in_a_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "u.db"
    path.write_bytes(bytes(4096))
    with kept(str(path), **BOUNDS) as ledger:
        assert ledger is not None
    [line] = caplog.records
    assert f"moved to {path}.damaged-" in line.getMessage()
