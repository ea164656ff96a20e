"""The ledger's file: whole batches, sums that stay, and no harm to anybody else's file."""

from __future__ import annotations

import sqlite3
import stat
from contextlib import closing
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.ledger import schema
from service.ledger.record import Record
from service.ledger.report import Range, summarize
from service.ledger.schema import NotALedger
from service.ledger.store import ROWS_AT_ONCE, Store
from tests.ledger.samples import DAY, NOON, numbers, sample, select


def write(path: Path, *records: Record, server: str = "a") -> None:
    with closing(Store(path)) as store:
        store.append(server, list(enumerate(records, start=1)))


def total(path: Path) -> dict[str, object]:
    report = summarize(path, "key", Range())
    return dict(zip(schema.SUMS, report.total, strict=True))


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    path, record = tmp_path / "u.db", sample(3, reasoning_tokens=2, adapter="é")
    write(path, record)
    found = select(path, f"SELECT {', '.join(Record._fields)} FROM records")
    assert [Record(*row) for row in found] == [record]


def test_only_its_owner_may_read_it(tmp_path: Path) -> None:
    path = tmp_path / "u.db"
    with closing(Store(path)) as store:
        store.append("a", [(1, sample())])
        for file in tmp_path.iterdir():  # SQLite's own files beside it, too
            assert stat.S_IMODE(file.stat().st_mode) == 0o600, file


def test_a_batch_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "u.db"
    bad = sample()._replace(model=object())  # type: ignore[arg-type]
    with closing(Store(path)) as store:
        many = [(number, sample(number)) for number in range(1, 500)]
        with pytest.raises(sqlite3.Error):
            store.append("a", [*many, (500, bad)])
        assert numbers(path) == []
        store.append("a", many)
    assert numbers(path) == list(range(1, 500))


def test_a_record_is_never_changed(tmp_path: Path) -> None:
    path = tmp_path / "u.db"
    write(path, sample())
    with pytest.raises(sqlite3.IntegrityError, match="append-only"):
        select(path, "UPDATE records SET generated_tokens = 0")


def text_file(path: Path) -> None:
    path.write_text("key,tokens\nann,12\n")


def other_database(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE mine (x)")
        connection.commit()


def newer_ledger(path: Path) -> None:
    write(path, sample())
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA user_version = {schema.VERSION + 1}")
        connection.execute("PRAGMA journal_mode = DELETE")


@pytest.mark.parametrize("make", [text_file, other_database, newer_ledger])
def test_another_programs_file_is_refused_and_untouched(tmp_path: Path, make) -> None:
    path = tmp_path / "x"
    make(path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(NotALedger):
        Store(path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def zeros(path: Path) -> None:
    path.write_bytes(bytes(8192))


def cut_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:60])


def cut_file(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5000])


def no_tables(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("DROP TABLE days")
        connection.commit()


def noise(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100] + b"\xa5" * 12_000)


@pytest.mark.parametrize("damage", [zeros, cut_header, cut_file, no_tables, noise])
def test_a_damaged_file_is_moved_aside_and_a_new_one_begun(tmp_path: Path, damage) -> None:
    path = tmp_path / "u.db"
    write(path, sample())
    damage(path)
    kept = path.read_bytes()
    with closing(Store(path)) as store:
        assert store.moved_to is not None
        assert store.moved_to.read_bytes() == kept
        assert store.check() is None
        store.append("a", [(7, sample())])
    assert numbers(path) == [7]


def test_a_damaged_page_is_found_when_all_is_read(tmp_path: Path) -> None:
    path = tmp_path / "u.db"
    write(path, *map(sample, range(2_000)))
    content = bytearray(path.read_bytes())
    content[40 * 4096 : 42 * 4096] = b"\xa5" * 8192
    path.write_bytes(content)
    with closing(Store(path)) as store:
        assert store.moved_to is None, "its first pages are whole"
        assert store.check() is not None
        moved = store.replace_damaged()
        assert moved.read_bytes() == content
        store.append("a", [(1, sample())])
        assert store.check() is None


def test_records_past_the_bound_become_sums_and_no_sum_changes(tmp_path: Path) -> None:
    path = tmp_path / "u.db"
    mixed = [
        sample(number, time=NOON + number * DAY / 10, finish=finish, key_id=f"k{number % 3}")
        for number, finish in enumerate(["stop", "error", "cancelled", "rejected", "length"] * 20)
    ]
    write(path, *mixed)
    before = total(path)
    with closing(Store(path)) as store:
        assert store.fold(30, 10_000, now=NOON) == 70
        assert store.fold(30, 10_000, now=NOON) == 0
    assert len(numbers(path)) == 30
    assert total(path) == before
    assert before["requests"] == 100
    assert (before["error"], before["cancelled"], before["rejected"]) == (20, 20, 20)


def test_old_records_become_sums_and_very_old_sums_go(tmp_path: Path) -> None:
    path = tmp_path / "u.db"
    write(path, *(sample(day, time=NOON + day * DAY) for day in range(10)))
    with closing(Store(path)) as store:
        while store.fold(1_000, 4, now=NOON + 9.5 * DAY):
            pass
        assert numbers(path) == [7, 8, 9, 10]
        assert total(path)["requests"] == 10
        write(path, sample(1))
        while store.fold(1, 4, now=NOON + 1_103 * DAY):
            pass
    days = [row[0] for row in select(path, "SELECT day FROM days ORDER BY day")]
    assert days == [f"2026-01-{day:02}" for day in range(4, 11)]


def test_what_is_unknown_stays_unknown_in_a_sum(tmp_path: Path) -> None:
    path = tmp_path / "u.db"
    write(path, sample(1), sample(2), sample(3, reasoning_tokens=4))
    with closing(Store(path)) as store:
        for most in (2, 1, 0):
            store.fold(most, 10_000, now=NOON)
    assert total(path)["reasoning_tokens"] == 4
    assert total(path)["energy_joules"] is None


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(0, 60), max_size=5), seed=st.integers(0, 10))
def test_how_records_are_cut_into_sums_changes_nothing(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int], seed: int
) -> None:
    path = tmp_path_factory.mktemp("cuts") / "u.db"
    write(path, *(sample(n, model=f"m{n % (seed + 1)}", time=NOON + n * 7_000) for n in range(60)))
    before = {by: summarize(path, by, Range()).rows for by in ("key", "model", "day")}  # type: ignore[arg-type]
    with closing(Store(path)) as store:
        for most in sorted(cuts, reverse=True):
            store.fold(most, 10_000, now=NOON)
    assert {by: summarize(path, by, Range()).rows for by in before} == before  # type: ignore[arg-type]


def test_two_servers_share_a_file(tmp_path: Path) -> None:
    path = tmp_path / "u.db"
    with closing(Store(path)) as one, closing(Store(path)) as other:
        for number in range(1, 21):
            one.append("one", [(number, sample(number))])
            other.append("other", [(number, sample(number))])
    found = select(path, "SELECT server, count(*), max(sequence) FROM records GROUP BY server")
    assert found == [("one", 20, 20), ("other", 20, 20)]


def test_batches_of_every_size_leave_no_memory_behind(tmp_path: Path) -> None:
    """Each size is a statement of its own, and a compiled one of 200 rows takes a megabyte."""
    process = psutil.Process()
    with closing(Store(tmp_path / "usage.db")) as store:
        store.append("s", [(number, sample(number)) for number in range(ROWS_AT_ONCE)])
        before = process.memory_info().rss
        for size in range(ROWS_AT_ONCE, 0, -2):
            first = size * ROWS_AT_ONCE
            store.append("s", [(number, sample(number)) for number in range(first, first + size)])
        assert process.memory_info().rss - before < 16 << 20
