"""Two minutes (or ``SOAK_SECONDS``) of everything at once; thirty is ``python -m tests.soak``."""

from __future__ import annotations

import json
import os

import pytest

from tests.soak.report import faults, summary
from tests.soak.run import KILLED, run
from tests.soak.visitors import KINDS

pytestmark = pytest.mark.soak


def test_mixed_traffic_under_faults_leaves_nothing_behind() -> None:
    soak = run(float(os.environ.get("SOAK_SECONDS", "120")))
    told = summary(soak)
    print(json.dumps(told, indent=1))
    assert faults(soak) == []
    assert len(soak.kills) == len(KILLED)
    assert told["books"]["pronk:engine_restarts_total"] == len(KILLED)
    assert set(told["kinds"]) == {kind.name for kind in KINDS} | {"burst"}
    assert told["endings"]["refused"] > 0, "no burst was ever too much"
    assert told["books"]["vllm:prefix_cache_hits_total"] > 0
