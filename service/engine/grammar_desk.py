"""Compiles what texts must follow, off the engine's steps, between receipt and queue.

Every grammar is tried in a process that can be ended (``grammar_trial``), then compiled in a thread
that leaves the interpreter lock. What is known, good or refused, is kept: the same schema comes
with request after request.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from model.grammar import Grammar, GrammarError, Vocabulary
from service.engine.grammar_trial import GrammarTrial
from service.engine.messages import Submit
from service.errors import EngineFailure, GrammarRefused, Overloaded, PronkError
from service.redaction import Redacted

logger = logging.getLogger("pronk.engine")

COMPILERS = 2  # one that is stuck leaves another
MOST_KNOWN = 64  # the least recently used are forgotten
MOST_WAITING = 256  # requests
PATIENCE = 5.0  # seconds a request waits for its turn

Known = Grammar | PronkError


@dataclass(slots=True, repr=False)
class Waiting(Redacted):
    front_end: int
    submit: Submit
    future: Future[Known]
    since: float = field(default_factory=time.monotonic)


class GrammarDesk:
    """The engine's main thread calls everything here; compiling is done in others."""

    def __init__(self, load: Callable[[], Vocabulary]) -> None:
        """``load`` runs in a thread at once: the tokens of a large vocabulary take a second."""
        self._threads = ThreadPoolExecutor(COMPILERS, thread_name_prefix="grammars")
        self._vocabulary = self._threads.submit(load)
        self._trials = threading.local()
        self._all_trials: list[GrammarTrial] = []
        self._known: OrderedDict[str, Future[Known]] = OrderedDict()
        self._waiting: list[Waiting] = []
        self._is_closed = False

    @property
    def is_busy(self) -> bool:
        return bool(self._waiting)

    def get(self, front_end: int, submit: Submit) -> Grammar | None:
        """The grammar of a request; None where it is compiled, and ``finished`` tells how it went.

        Raises what its client is to be told.
        """
        future = self._known.get(submit.grammar)
        if future is None:
            if len(self._waiting) >= MOST_WAITING:
                raise _busy()
            future = self._threads.submit(self._compile, submit.grammar, submit.request_id)
            self._known[submit.grammar] = future
            self._forget_oldest()
        else:
            self._known.move_to_end(submit.grammar)
        if not future.done():
            self._waiting.append(Waiting(front_end, submit, future))
            return None
        known = future.result()
        if isinstance(known, PronkError):
            raise known
        return known

    def finished(self) -> list[tuple[int, Submit, Known]]:
        """(front end, what it submitted, what came of its grammar), in the order of arrival."""
        now = time.monotonic()
        done = [one for one in self._waiting if one.future.done() or now - one.since > PATIENCE]
        self._waiting = [one for one in self._waiting if one not in done]
        return [
            (one.front_end, one.submit, one.future.result() if one.future.done() else _busy())
            for one in done
        ]

    def cancel(self, front_end: int, id: int | None = None) -> None:
        """Nobody waits for this any more; without ``id`` for nothing of this front end."""
        self._waiting = [
            one
            for one in self._waiting
            if one.front_end != front_end or (id is not None and one.submit.id != id)
        ]

    def close(self) -> None:
        self._is_closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        for trial in self._all_trials:
            trial.close()

    def _forget_oldest(self) -> None:
        for text in list(self._known):
            if len(self._known) <= MOST_KNOWN:
                return
            if self._known[text].done():
                del self._known[text]

    def _compile(self, text: str, request_id: str) -> Known:
        try:
            vocabulary = self._vocabulary.result()
        except Exception as error:
            logger.error("no vocabulary for grammars: %s", type(error).__name__, exc_info=error)
            return GrammarRefused("This model's tokenizer cannot follow a grammar.")
        try:
            return Grammar(self._trial().run(text), vocabulary)
        except GrammarError as error:
            return GrammarRefused(str(error))
        except Exception as error:
            if self._is_closed:
                return EngineFailure("The engine is stopped.")
            logger.error(
                "a grammar was not compiled: %s",
                type(error).__name__,
                exc_info=error,
                extra={"request_id": request_id},
            )
            return EngineFailure("The engine failed to compile the grammar: send it again.")

    def _trial(self) -> GrammarTrial:
        """This thread's."""
        found: GrammarTrial | None = getattr(self._trials, "own", None)
        if found is None:
            found = self._trials.own = GrammarTrial()
            self._all_trials.append(found)
        return found


def _busy() -> Overloaded:
    return Overloaded(
        "Too many new grammars are being compiled: try again later.",
        code="grammars_busy",
        retry_after=1.0,
    )
