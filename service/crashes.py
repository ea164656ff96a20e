"""What a process leaves behind when it fails: a line in the log, and nothing of what it held.

Python prints the words of an exception that nobody caught, asyncio the arguments of the callback;
both may quote a request. The kernel writes the whole memory.
"""

from __future__ import annotations

import asyncio
import logging
import re
import resource
import sys
import threading
from types import TracebackType
from typing import Any

logger = logging.getLogger("pronk")

# Less than a page is written nowhere, and of one byte Linux says (core(5)): not to the program that
# ``core_pattern`` may name either, which 0 would not keep from being started.
NO_CORE = 1


def forbid_core_dumps() -> None:
    """Of this process and its children. An operator's prlimit can still allow them: the hard limit
    stays as it is."""
    hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
    soft = NO_CORE if hard == resource.RLIM_INFINITY else min(NO_CORE, hard)
    resource.setrlimit(resource.RLIMIT_CORE, (soft, hard))


def log_uncaught() -> None:
    """Exceptions that end the process or a thread, or that nobody can catch, go through the log."""
    sys.excepthook = _log_fatal
    threading.excepthook = _log_thread
    sys.unraisablehook = _log_unraisable


def _log_fatal(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        logger.critical("ending: %s", kind.__name__, exc_info=(kind, error, trace))


def _log_thread(problem: threading.ExceptHookArgs) -> None:
    if not issubclass(problem.exc_type, SystemExit):
        name = problem.thread.name if problem.thread is not None else "of no name"
        logger.error("a thread ended: %s", name, exc_info=problem.exc_value)


def _log_unraisable(problem: Any) -> None:
    logger.error("an exception was lost", exc_info=problem.exc_value)


def log_loop_failure(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """An event loop's exception handler: what happened, without the values it happened to."""
    told = re.split(r"[(<{\[]", str(context.get("message", "")), maxsplit=1)[0]
    logger.error("%s", told.strip() or "a failure", exc_info=context.get("exception"))
