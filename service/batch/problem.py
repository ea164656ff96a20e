"""Why a batch cannot run or go on."""

from __future__ import annotations


class BatchProblem(RuntimeError):
    """The text says why in one line; what was answered stands in the output already."""
