"""What the usage ledger remembers of a key, for its quotas."""

from __future__ import annotations

import logging
import sqlite3

from service.keys.spent import SpentTokens, nothing
from service.ledger.ledger import Ledger
from service.ledger.report import Unreadable

logger = logging.getLogger("pronk.keys")


def history_of(ledger: Ledger | None) -> SpentTokens:
    """A ledger that cannot be read costs quotas their past, and no caller the answer."""
    if ledger is None:
        return nothing

    def spent(key_id: str, since: float) -> int:
        try:
            return ledger.tokens_since(key_id, since)
        except (sqlite3.Error, OSError, Unreadable) as error:
            logger.error("a quota begins at 0, because the usage ledger cannot be read: %s", error)
            return 0

    return spent
