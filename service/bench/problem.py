"""What keeps a benchmark from running, told in one line."""

from __future__ import annotations


class BenchProblem(RuntimeError):
    """The benchmark cannot start or go on; the text says why in one line."""
