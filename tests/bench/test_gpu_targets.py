"""The script for a lent GPU is known to run: on a tiny shape, here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.benchmarks.gpu_targets import Target

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--shape", "tiny", "--device", "cpu", "--rows", "4", "--prompt", "300", "--tokens", "8"]


def test_every_target_is_measured_on_a_tiny_shape() -> None:
    command = [sys.executable, "-m", "tests.benchmarks.gpu_targets", *SMALL]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert told.returncode == 0, told.stderr
    lines = [line for line in told.stdout.splitlines() if line.endswith(("met", "missed"))]
    for line, what in zip(lines, ("1 rows", "4 rows", "prompt of 300", "outside"), strict=True):
        assert what in line


def test_a_target_is_met_from_its_own_side() -> None:
    assert str(Target("a", 0.9, 0.85)).endswith("at least 85%: met")
    assert str(Target("a", 0.8, 0.85)).endswith("missed")
    assert str(Target("a", 0.04, 0.05, is_least=False)).endswith("at most 5%: met")
    assert str(Target("a", 0.06, 0.05, is_least=False)).endswith("missed")
