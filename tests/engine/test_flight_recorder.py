"""What the engine had at hand is known when it is gone, however it went."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

from service.engine.flight_recorder import MOST, FlightRecorder

ROOT = Path(__file__).resolve().parents[2]
CHILD = """
import os, signal, sys
from service.engine.flight_recorder import FlightRecorder
FlightRecorder(int(sys.argv[1])).write([5, 2**40, 7])
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_it_outlives_the_process_that_wrote_it() -> None:
    recorder = FlightRecorder.create()
    assert recorder.read() == []
    command = [sys.executable, "-c", CHILD, str(recorder.descriptor)]
    ended = subprocess.run(command, cwd=ROOT, pass_fds=(recorder.descriptor,), check=False)
    assert ended.returncode == -signal.SIGKILL
    assert recorder.read() == [5, 2**40, 7]
    recorder.write([])
    assert recorder.read() == []
    recorder.close()


def test_it_has_no_name_and_is_gone_when_it_is_closed() -> None:
    before, shared = set(os.listdir("/proc/self/fd")), set(os.listdir("/dev/shm"))
    recorder = FlightRecorder.create()
    assert set(os.listdir("/dev/shm")) <= shared
    recorder.close()
    assert set(os.listdir("/proc/self/fd")) == before


def test_more_than_it_holds_and_a_count_that_cannot_be_are_borne() -> None:
    recorder = FlightRecorder.create()
    recorder.write(range(MOST + 10))
    assert recorder.read() == [*range(MOST)]
    struct.pack_into("<Q", recorder._memory, 0, 2**63)
    assert len(recorder.read()) == MOST
    recorder.close()
