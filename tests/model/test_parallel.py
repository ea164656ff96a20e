"""Ranks that are real processes add up and join what each of them holds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model.parallel import ParallelGroup

ROOT = Path(__file__).resolve().parents[2]
RANK = """
import sys
import torch
import torch.distributed as dist
from model.parallel import ParallelGroup

rank, store = int(sys.argv[1]), dist.FileStore(sys.argv[2], 2)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
group = ParallelGroup(rank, 2, dist.group.WORLD)
own = torch.tensor([[1.0, 2.0]]) + 10 * rank
print(group.gather_columns(own).tolist(), group.all_reduce(own.clone()).tolist())
dist.destroy_process_group()
"""


def test_two_processes_sum_and_join(tmp_path: Path) -> None:
    command = [sys.executable, "-c", RANK]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store")],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    answers = [rank.communicate(timeout=60)[0].strip() for rank in ranks]
    assert answers == ["[[1.0, 2.0, 11.0, 12.0]] [[12.0, 14.0]]"] * 2


def test_one_rank_changes_nothing() -> None:
    x = torch.randn(3, 4)
    group = ParallelGroup()
    assert group.all_reduce(x) is x
    assert group.gather_columns(x) is x
    assert group.share(7) == 7


def test_what_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="7 heads cannot be shared by 2 ranks"):
        ParallelGroup(0, 2).share(7, "heads")
