"""The server's end of the ledger: ``add`` never waits, a thread writes what was added.

What a crash can cost: requests that had not ended, and records added in the last ``INTERVAL``
(plus a commit); each commit is synced, so a power cut costs no more than a kill. Where the file
cannot be written (disk full, locked by another program), records wait in memory, ``MAX_UNWRITTEN``
of them; those past it are counted as dropped. Requests are answered all the same.
"""

from __future__ import annotations

import logging
import os
import secrets
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from service.ledger.record import Record
from service.ledger.report import charged_since
from service.ledger.store import Numbered, Store

logger = logging.getLogger("pronk.ledger")

INTERVAL = 0.5  # seconds between two commits
MAX_UNWRITTEN = 20_000  # records: some 10 MB
FOLD_INTERVAL = 60.0
CLOSE_SECONDS = 5.0


class Ledger:
    """Open from its making to ``close``. Threads may share it."""

    def __init__(
        self,
        store: Store,
        *,
        max_records: int = 1_000_000,
        max_days: float = 400,
        interval: float = INTERVAL,
        max_unwritten: int = MAX_UNWRITTEN,
    ) -> None:
        self.server = f"{os.getpid()}-{secrets.token_hex(4)}"  # whose records these are
        self.num_written = 0
        self.num_dropped = 0
        self._store = store
        self._max_records = max_records
        self._max_days = max_days
        self._interval = interval
        self._max_unwritten = max_unwritten
        self._lock = threading.Lock()
        self._unwritten: deque[Numbered] = deque()
        self._num_added = 0
        self._trouble: str | None = None
        self._next_fold = 0.0
        self._arrived = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="usage ledger", daemon=True)
        self._thread.start()

    @property
    def path(self) -> Path:
        return self._store.path

    @property
    def num_unwritten(self) -> int:
        return len(self._unwritten)

    @property
    def trouble(self) -> str | None:
        """Why nothing can be written at the moment."""
        return self._trouble

    def add(self, record: Record) -> None:
        with self._lock:
            self._num_added += 1
            if len(self._unwritten) < self._max_unwritten:
                self._unwritten.append((self._num_added, record))
            else:
                self.num_dropped += 1
        self._arrived.set()

    def tokens_since(self, key_id: str, since: float) -> int:
        """What quotas count of a key's requests that ended at ``since`` (epoch seconds) or later.

        All servers' that write to this file, and this one's that are not written yet. Reads the
        file: some milliseconds for thousands of records, so call it off the event loop and count on
        from there. Of days that are kept as sums alone, the one ``since`` lies in counts whole.
        Raises ``sqlite3.Error``.
        """
        with self._lock:
            waiting = list(self._unwritten)
            first = waiting[0][0] if waiting else self._num_added + 1
        known = charged_since(self.path, key_id, since, self.server, first)
        return known + sum(
            record.num_charged
            for _, record in waiting
            if record.key_id == key_id and record.time >= since
        )

    def close(self) -> None:
        """Write what is left; gives up after some seconds and counts that as dropped."""
        self._closing.set()
        self._arrived.set()
        self._thread.join(CLOSE_SECONDS)
        with self._lock:
            lost = len(self._unwritten)
            self.num_dropped += lost
            self._unwritten.clear()
        if lost:
            logger.error("%d usage records were lost: %s", lost, self._trouble or "no time left")

    # ---- the writer's thread

    def _run(self) -> None:
        self._try(self._check)
        self._try(self._fold)
        while not self._closing.is_set():
            self._arrived.wait(FOLD_INTERVAL)
            self._closing.wait(self._interval)
            self._arrived.clear()
            self._try(self._write)
            self._try(self._fold)
        self._try(self._write)
        self._store.close()

    def _try(self, work: Callable[[], None]) -> None:
        """One line when trouble begins, one when it is over; the thread lives on."""
        try:
            work()
        except Exception as error:
            told = str(error) if isinstance(error, (sqlite3.Error, OSError)) else repr(error)
            if self._trouble is None:
                logger.error("usage records cannot be written: %s; they wait in memory", told)
            self._trouble = told
            self._arrived.set()  # tried again after the interval

    def _check(self) -> None:
        """The whole file once, while requests are served already."""
        if (problem := self._store.check()) is not None:
            moved = self._store.replace_damaged()
            logger.error("the usage ledger is damaged (%s): moved to %s", problem, moved)

    def _write(self) -> None:
        with self._lock:
            batch: Sequence[Numbered] = list(self._unwritten)
        if batch:
            self._store.append(self.server, batch)
            with self._lock:
                for _ in batch[: len(self._unwritten)]:  # none are left once closing gave up
                    self._unwritten.popleft()
                self.num_written += len(batch)
        if self._trouble is not None:
            logger.warning(
                "usage records are written again; %d were dropped since the start", self.num_dropped
            )
            self._trouble = None

    def _fold(self) -> None:
        """All that is due, a part at a time: other servers get their turn between."""
        if time.monotonic() < self._next_fold:
            return
        self._next_fold = time.monotonic() + FOLD_INTERVAL
        while self._store.fold(self._max_records, self._max_days):
            if self._closing.is_set():
                return
