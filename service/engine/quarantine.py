"""Which requests were at hand when an engine died, and which of them are refused for it.

Known by a hash under a secret of this process's life, so that the table tells nobody what was
asked, and by account, so that nobody learns of another one's requests by being refused.
"""

from __future__ import annotations

import hmac
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import msgspec
from msgspec.structs import replace

from service.engine.messages import Submit
from service.errors import PoisonRequest

REFUSED_FOR = 600.0  # seconds from the last death
MOST = 1024  # requests remembered
FATAL = 2  # deaths of one that cannot be told from the culprit
FATAL_IN_COMPANY = 3  # deaths of one that always had another suspect beside it


@dataclass(slots=True)
class Record:
    """``has_passed``: it has come further by now than when the engine died."""

    num_deaths: int
    progress: int  # tokens it had given when the engine died
    expires: float
    has_passed: bool = False
    is_convicted: bool = False


class Quarantine:
    """``note_death``, then ``refuse_convicted``; one that ends well is forgotten (``acquit``)."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.num_convicted = 0
        self.num_refused = 0
        self._clock = clock
        self._secret = secrets.token_bytes(32)
        self._records: OrderedDict[bytes, Record] = OrderedDict()  # last to die last

    def __len__(self) -> int:
        return len(self._records)

    def note_death(self, at_hand: Iterable[tuple[Submit, int]]) -> bool:
        """Those that were computed when the engine died, each with the tokens it had given.

        True where all of them are suspects now: nobody was convicted who explains it. A second
        death convicts the only one that had one before and had not passed since, or one that is
        alone at hand. Otherwise nobody knows which of them it was (or whether it was any of
        them: engines are also killed from outside), and a third death is waited for.
        """
        self._expire()
        names = {self._name(submit): progress for submit, progress in at_hand}
        known = [name for name in names if name in self._records]
        doubtful = [name for name in known if not self._records[name].has_passed]
        is_alone = len(names) == 1
        culprits = doubtful if len(doubtful) == 1 else known if is_alone else []
        for name in culprits or names:
            self._note(name, names[name], is_culprit=bool(culprits))
        while len(self._records) > MOST:
            self._records.popitem(last=False)
        return bool(names) and not culprits

    def _note(self, name: bytes, progress: int, *, is_culprit: bool) -> None:
        record = self._records.pop(name, None) or Record(0, 0, 0.0)
        record.num_deaths += 1
        record.progress = max(record.progress, progress)
        record.expires = self._clock() + REFUSED_FOR
        record.has_passed = False
        if record.num_deaths >= (FATAL if is_culprit else FATAL_IN_COMPANY):
            self.num_convicted += not record.is_convicted
            record.is_convicted = True
        self._records[name] = record

    def note_passed(self, submit: Submit) -> None:
        if (record := self.find(submit)) is not None:
            record.has_passed = True

    def refuse_convicted(self, submit: Submit) -> None:
        """Raises ``PoisonRequest``."""
        record = self.find(submit)
        if record is None or not record.is_convicted:
            return
        self.num_refused += 1
        raise PoisonRequest(
            "This request ended the engine each time it was computed, so it is refused for "
            f"{REFUSED_FOR / 60:.0f} minutes. Change it, and report it to whoever runs the server.",
        )

    def find(self, submit: Submit) -> Record | None:
        if not self._records:  # as good as always: hashing is for the days after a death
            return None
        self._expire()
        return self._records.get(self._name(submit))

    def acquit(self, submit: Submit) -> None:
        """It was computed to its end: whatever killed the engine was something else."""
        if self._records:
            self._records.pop(self._name(submit), None)

    def _expire(self) -> None:
        now = self._clock()
        while self._records and next(iter(self._records.values())).expires <= now:
            self._records.popitem(last=False)

    def _name(self, submit: Submit) -> bytes:
        """Seeds are left out: the server draws one where the client sends none."""
        settings = [replace(one, seed=0) for one in submit.settings]
        asked = (
            submit.account,
            submit.prompt,
            settings,
            submit.prompt_logprobs,
            submit.logprobs_from,
            submit.adapter,
            submit.grammar,
            submit.pooling,
        )
        return hmac.digest(self._secret, msgspec.msgpack.encode(asked), "sha256")
