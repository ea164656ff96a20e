"""Where the ledger lies, and opening it for a server."""

from __future__ import annotations

import logging
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from service.ledger.ledger import Ledger
from service.ledger.schema import Damaged, NotALedger
from service.ledger.store import Store

logger = logging.getLogger("pronk.ledger")
NONE = "none"


class LedgerProblem(RuntimeError):
    """The ledger that was asked for cannot be kept; the text says why in one line."""


def default_path() -> Path:
    """``pronk/usage.db`` in the user's state folder."""
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(state).expanduser() / "pronk" / "usage.db"


@contextmanager
def kept(
    wanted: str | None, *, max_records: int, max_days: float, by_default: bool = True
) -> Iterator[Ledger | None]:
    """``wanted``: a file, ``none``, or None for the default place.

    What was asked for by name must be possible, else ``LedgerProblem``; the default place may be
    missing (a read-only container), which is said in one line.
    """
    wanted = wanted or None  # an empty variable is no name
    if wanted == NONE or (wanted is None and not by_default):
        yield None
        return
    try:
        store = open_store(wanted)
    except LedgerProblem as problem:
        if wanted is not None:
            raise
        logger.warning("%s: usage is not recorded; --ledger FILE or none says otherwise", problem)
        yield None
        return
    ledger = Ledger(store, max_records=max_records, max_days=max_days)
    try:
        yield ledger
    finally:
        ledger.close()


def find_path(wanted: str | None) -> Path:
    """Raises ``RuntimeError`` where the user has no home."""
    return Path(wanted).expanduser() if wanted else default_path()


def open_store(wanted: str | None) -> Store:
    try:
        path = find_path(wanted)
    except RuntimeError as error:
        raise LedgerProblem(f"cannot keep a usage ledger: {error}") from None
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        store = Store(path)
    except (NotALedger, Damaged, OSError, sqlite3.Error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise LedgerProblem(f"cannot keep the usage ledger {path}: {reason}") from None
    if store.moved_to is not None:
        logger.error(
            "the usage ledger was damaged: moved to %s, a new one is begun", store.moved_to
        )
    return store
