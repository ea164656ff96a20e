"""Adding never waits and never fails; what is lost is counted, and a kill loses little."""

from __future__ import annotations

import logging
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from service.ledger.ledger import Ledger
from service.ledger.store import Store
from tests.ledger.samples import DAY, NOON, numbers, sample, select
from tests.running import ROOT

QUICK = 0.01


@contextmanager
def kept(path: Path, **bounds: Any) -> Iterator[Ledger]:
    ledger = Ledger(Store(path), **{"interval": QUICK, **bounds})
    try:
        yield ledger
    finally:
        ledger.close()


def wait(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "did not come to pass"
        time.sleep(0.005)


def test_closing_writes_what_was_added(tmp_path: Path) -> None:
    path = tmp_path / "u.db"
    with kept(path, interval=60) as ledger:
        for number in range(1_000):
            ledger.add(sample(number))
        assert ledger.num_unwritten == 1_000
    assert numbers(path) == list(range(1, 1_001))
    assert (ledger.num_written, ledger.num_dropped) == (1_000, 0)


def test_records_reach_the_file_by_themselves(tmp_path: Path) -> None:
    with kept(tmp_path / "u.db") as ledger:
        for number in range(3):
            ledger.add(sample(number))
            wait(lambda: ledger.num_unwritten == 0)
        assert numbers(tmp_path / "u.db") == [1, 2, 3]


def fill_disk(ledger: Ledger) -> None:
    """SQLite's own answer to a full disk, by a bound on the file's pages."""
    store = ledger._store
    [pages] = store._connection.execute("PRAGMA page_count").fetchone()
    store._connection.execute(f"PRAGMA max_page_count = {pages}")


def test_a_full_disk_costs_records_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "u.db"
    with kept(path, max_unwritten=50) as ledger:
        fill_disk(ledger)
        for number in range(1, 101):
            ledger.add(sample(number, model="m" * 4_000))
        wait(lambda: ledger.trouble)
        assert "full" in (ledger.trouble or "")
        assert ledger.num_dropped >= 50
        dropped = ledger.num_dropped
        time.sleep(5 * QUICK)
        assert (ledger.num_unwritten, ledger.num_written) == (100 - dropped, 0)
        ledger._store._connection.execute("PRAGMA max_page_count = 1000000")
        wait(lambda: ledger.num_unwritten == 0)
        wait(lambda: ledger.trouble is None)  # told a moment after they are gone
        ledger.add(sample(101))
    assert numbers(path) == [*range(1, 101 - dropped), 101]
    told = [record for record in caplog.records if record.name == "pronk.ledger"]
    assert [record.levelno for record in told] == [logging.ERROR, logging.WARNING]
    assert f"{dropped} were dropped" in told[1].getMessage()


def test_a_locked_file_makes_nobody_wait(tmp_path: Path) -> None:
    path = tmp_path / "u.db"
    with kept(path) as ledger, closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        began = time.monotonic()
        for number in range(1, 1_001):
            ledger.add(sample(number))
        assert time.monotonic() - began < 0.9, "SQLite's own wait for a lock is a second"
        wait(lambda: ledger.trouble)
        other.execute("COMMIT")
        wait(lambda: ledger.num_unwritten == 0)
    assert numbers(path) == list(range(1, 1_001))
    assert ledger.num_dropped == 0


def test_closing_gives_up_on_a_file_that_stays_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("service.ledger.ledger.CLOSE_SECONDS", 0.2)
    path = tmp_path / "u.db"
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        ledger = Ledger(Store(path), interval=QUICK)
        wait(lambda: not ledger._store.check())
        other.execute("BEGIN EXCLUSIVE")
        ledger.add(sample())
        ledger.close()
        other.execute("ROLLBACK")
    assert ledger.num_dropped == 1
    assert "1 usage records were lost" in caplog.text
    ledger._thread.join(30)


def test_a_file_damaged_within_is_replaced_while_records_come(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "u.db"
    with kept(path) as ledger:
        for number in range(2_000):
            ledger.add(sample(number))
    content = bytearray(path.read_bytes())
    content[40 * 4096 : 42 * 4096] = b"\xa5" * 8192
    path.write_bytes(content)
    with kept(path) as ledger:
        ledger.add(sample(1))
    assert numbers(path) == [1]
    assert [file for file in tmp_path.iterdir() if ".damaged-" in file.name]
    assert "is damaged" in caplog.text


def test_too_many_records_are_folded_by_itself(tmp_path: Path) -> None:
    path = tmp_path / "u.db"
    with kept(path) as ledger:
        for number in range(100):
            ledger.add(sample(number))
    with kept(path, max_records=10):
        wait(lambda: len(numbers(path)) == 10)
    assert select(path, "SELECT sum(requests) FROM days") == [(90,)]


# ---- what quotas ask


def test_tokens_of_a_key_count_from_a_moment_on_written_or_not(tmp_path: Path) -> None:
    path = tmp_path / "u.db"
    with kept(path) as ledger:
        ledger.add(sample(0))
        ledger.add(sample(10))
        ledger.add(sample(20, key_id="k2"))
        wait(lambda: ledger.num_unwritten == 0)
    with kept(path, interval=60) as ledger:
        ledger.add(sample(30))
        ledger.add(sample(40, key_id="k2"))
        assert ledger.num_unwritten == 2
        assert ledger.tokens_since("k1", NOON) == 48  # each one's 10 + 5 + 1
        assert ledger.tokens_since("k1", NOON + 5) == 32
        assert ledger.tokens_since("k1", NOON + 30) == 16
        assert ledger.tokens_since("k2", NOON) == 32
        assert ledger.tokens_since("k3", NOON) == 0


def test_tokens_of_days_kept_as_sums_still_count(tmp_path: Path) -> None:
    path = tmp_path / "u.db"
    with kept(path) as ledger:
        for day in range(4):
            ledger.add(sample(day, time=NOON + day * DAY))
        wait(lambda: ledger.num_unwritten == 0)
        ledger._store.fold(1, 10_000, now=NOON)
        assert ledger.tokens_since("k1", NOON - DAY) == 64
        assert ledger.tokens_since("k1", NOON + 0.5 * DAY) == 48


def test_no_record_counts_twice_or_never_while_it_is_written(tmp_path: Path) -> None:
    with kept(tmp_path / "u.db", interval=0.001) as ledger:
        is_over = threading.Event()
        seen: list[tuple[int, int, int]] = []
        added = 0

        def ask() -> None:
            while not is_over.is_set():
                before = added
                found = ledger.tokens_since("k1", NOON)
                seen.append((before, found, added))

        asker = threading.Thread(target=ask)
        asker.start()
        for number in range(2_000):
            ledger.add(sample(number))
            added += 1
            if number % 10 == 0:
                time.sleep(0.0005)
        is_over.set()
        asker.join()
        assert ledger.tokens_since("k1", NOON) == 2_000 * 16
    assert len(seen) > 10
    for before, found, after in seen:
        assert before * 16 <= found <= (after + 1) * 16


# ---- kills

WRITER = """
import sys, time
from pathlib import Path
from service.ledger.ledger import Ledger
from service.ledger.store import Store
from tests.ledger.samples import sample

ledger = Ledger(Store(Path(sys.argv[1])), interval=float(sys.argv[2]))
for number in range(1, int(sys.argv[3]) + 1):
    ledger.add(sample(number))
    print(number, ledger.num_written, time.monotonic(), flush=True)
    time.sleep(0.001)
ledger.close()
"""


def writer(path: Path, interval: float, count: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(path), str(interval), str(count)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("kill_at", [1, 100, 3_000])
def test_a_kill_amid_writes_leaves_a_whole_file_and_loses_the_last_batch_at_most(
    tmp_path: Path, kill_at: int
) -> None:
    path = tmp_path / "u.db"
    times: list[float] = []
    written = 0
    with writer(path, 0.05, 1_000_000) as process:
        assert process.stdout is not None
        for line in process.stdout:
            number, written_by_now, now = line.split()
            times.append(float(now))
            written = int(written_by_now)
            if int(number) == kill_at:
                process.send_signal(signal.SIGKILL)  # it says some more until that has come
    with closing(Store(path)) as store:
        assert store.moved_to is None
        assert store.check() is None
    assert select(path, "PRAGMA integrity_check") == [("ok",)]
    found = numbers(path)
    assert found == list(range(1, len(found) + 1)), "a prefix of what was added"
    assert written <= len(found) <= len(times) + 1
    if len(found) < len(times):
        assert times[-1] - times[len(found)] < 2.0, "what was lost was added just before"
    halves = "SELECT count(*) FROM records WHERE request_id <> 'req-' || sequence OR time <> ?"
    assert select(path, halves.replace("?", f"{NOON} + sequence")) == [(0,)]


def test_processes_that_share_a_file_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "u.db"
    writers = [writer(path, 0.005, 200) for _ in range(3)]  # they open it at the same time, too
    for process in writers:
        process.communicate(timeout=60)
        assert process.returncode == 0
    found = select(path, "SELECT count(*), count(DISTINCT sequence) FROM records GROUP BY server")
    assert found == [(200, 200)] * 3
    assert not [file for file in tmp_path.iterdir() if "damaged" in file.name]


def test_a_server_that_asked_the_file_of_a_key_keeps_its_records_when_another_one_ends(
    tmp_path: Path,
) -> None:
    """SQLite's locks are the process's: whoever gives them up loses the journal it writes to."""
    path = tmp_path / "u.db"
    with kept(path) as ledger:
        ledger.add(sample(1))
        wait(lambda: ledger.num_unwritten == 0)
        ledger.tokens_since("k1", 0)
        with writer(path, 0.005, 10) as other:
            other.communicate(timeout=60)
        ledger.add(sample(2))
        wait(lambda: ledger.num_unwritten == 0)
        found = "SELECT sequence FROM records WHERE server = ?"
        assert select(path, found.replace("?", repr(ledger.server))) == [(1,), (2,)]
