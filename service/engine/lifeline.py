"""An engine does not outlive the process that started it, however that one ended.

Standard input stays open after the options were read and carries nothing more: its end of file
means the parent is gone (the kernel closes it for a killed process too). A thread waits for it,
tidies up and leaves. Should the interpreter lock be held just then, the kernel's parent-death
signal sets off an alarm that needs no interpreter and ends the process GRACE seconds later.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable

PR_SET_PDEATHSIG = 1
PARENT_DIED = signal.SIGHUP  # number 1: the alarm below takes the signal's number as its seconds
GRACE = int(PARENT_DIED)
EXIT_CODE = 70


def die_with_parent(parent: int | None, tidy: Callable[[], None]) -> None:
    """Watch standard input; call ``tidy`` (any thread) and exit when the parent is gone."""
    _arm_alarm()
    if parent is not None and os.getppid() != parent:
        _leave(tidy)  # it died before the signal was asked for
    threading.Thread(target=_watch, args=(tidy,), name="lifeline", daemon=True).start()


def _arm_alarm() -> None:
    """Make PARENT_DIED call ``alarm(GRACE)`` in C; SIGALRM's default action ends the process."""
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    libc.signal.restype = ctypes.c_void_p
    libc.signal(int(PARENT_DIED), ctypes.cast(libc.alarm, ctypes.c_void_p))
    libc.prctl(PR_SET_PDEATHSIG, int(PARENT_DIED), 0, 0, 0)


def _watch(tidy: Callable[[], None]) -> None:
    while os.read(0, 4096):
        pass
    _leave(tidy)


def _leave(tidy: Callable[[], None]) -> None:
    try:
        tidy()
    finally:
        os._exit(EXIT_CODE)
