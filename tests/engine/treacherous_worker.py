"""The real engine process with a runner that fails on demand: a prompt's first token says how.

KILLS ends the process in the middle of a step, RAISES makes the step raise, FILLS finds no device
memory for a step of more than one row or SMALL tokens, FILLS_ALONE none at all.
"""

from __future__ import annotations

import os
import signal
import sys

import torch

from service.engine import worker
from service.engine.runner import Launched, ModelRunner
from service.engine.step import Step

KILLS, RAISES, FILLS, FILLS_ALONE = range(250, 254)
SMALL = 24
launch = ModelRunner.launch


def treacherous_launch(self: ModelRunner, step: Step, before: Launched | None = None) -> Launched:
    launched = launch(self, step, before)  # fails after the fact: pages are written
    first = {row.sequence.tokens[0] for row in step.rows}
    if KILLS in first:
        os.kill(os.getpid(), signal.SIGKILL)
    if RAISES in first:
        raise RuntimeError("a kernel that does not like this row")
    is_large = len(step.rows) > 1 or step.num_tokens > SMALL
    if FILLS_ALONE in first or (FILLS in first and is_large):
        raise torch.OutOfMemoryError("out of memory")
    return launched


if __name__ == "__main__":
    ModelRunner.launch = treacherous_launch  # type: ignore[method-assign]
    sys.exit(worker.main())
