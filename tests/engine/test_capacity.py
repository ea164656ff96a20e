"""The cache gets what is useful, never more than there is, and says what would fit."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.engine import machine
from service.engine.capacity import (
    Limits,
    NotEnoughMemory,
    limits_that_fit,
    limits_that_keep_pace,
    limits_wanted,
    num_blocks,
    num_host_slots,
)
from service.engine.options import EngineOptions

LIMITS = Limits(max_num_seqs=4, max_num_batched_tokens=512, max_model_len=1000, block_size=256)
PAGE = 1 << 20
PLENTY = 1 << 40


def options(**fields: object) -> EngineOptions:
    return EngineOptions(model="m", socket="s", **fields)  # type: ignore[arg-type]


def test_no_more_pages_than_every_sequence_could_use() -> None:
    assert num_blocks(options(), LIMITS, PAGE, PLENTY, PLENTY) == 4 * 4 + 1


def test_no_more_pages_than_the_budget() -> None:
    assert num_blocks(options(), LIMITS, PAGE, 7 * PAGE, PLENTY) == 7


def test_what_was_asked_for_is_taken_at_its_word() -> None:
    assert num_blocks(options(num_kv_blocks=99), LIMITS, PAGE, PAGE, PLENTY) == 99
    assert num_blocks(options(kv_cache_memory=50 * PAGE), LIMITS, PAGE, PAGE, PLENTY) == 50


def test_what_does_not_fit_is_refused_with_the_setting_to_change() -> None:
    with pytest.raises(NotEnoughMemory, match="lower kv_cache_memory"):
        num_blocks(options(kv_cache_memory=50 * PAGE), LIMITS, PAGE, PAGE, 20 * PAGE)
    with pytest.raises(NotEnoughMemory, match="lower block_size"):
        num_blocks(options(), LIMITS, PAGE, PAGE, PLENTY)


def test_host_memory_is_counted_in_whole_pages_and_refused_with_the_setting_to_change() -> None:
    assert num_host_slots(options(), PAGE, PLENTY) == 0
    assert num_host_slots(options(host_cache_memory=5 * PAGE + 1), PAGE, PLENTY) == 5
    with pytest.raises(NotEnoughMemory, match=r"host_cache_memory is 5\.0 MiB, 4\.0 MiB are"):
        num_host_slots(options(host_cache_memory=5 * PAGE), PAGE, 4 * PAGE)
    with pytest.raises(NotEnoughMemory, match="lower block_size"):
        num_host_slots(options(host_cache_memory=PAGE - 1), PAGE, PLENTY)


def test_the_length_follows_the_cache_unless_it_was_asked_for() -> None:
    assert limits_that_fit(options(), LIMITS, 3).max_model_len == 512
    assert limits_that_fit(options(), LIMITS, 5) is LIMITS
    with pytest.raises(NotEnoughMemory, match="holds 512 tokens"):
        limits_that_fit(options(max_model_len=1000), LIMITS, 3)


def test_defaults_follow_the_device_and_every_sequence_may_decode_at_once() -> None:
    assert limits_wanted(options(), 2048, is_gpu=False) == Limits(64, 512, 2048, 256)
    assert limits_wanted(options(), 2048, is_gpu=True) == Limits(256, 8192, 2048, 256)
    crowded = options(max_num_seqs=100, max_num_batched_tokens=10, max_model_len=5)
    assert limits_wanted(crowded, 2048, is_gpu=False) == Limits(100, 100, 5, 256)
    with pytest.raises(ValueError, match="at most 2048 positions"):
        limits_wanted(options(max_model_len=4096), 2048, is_gpu=False)


def test_a_slow_machine_gets_shorter_steps_unless_they_were_asked_for() -> None:
    limits = Limits(max_num_seqs=64, max_num_batched_tokens=512, max_model_len=9, block_size=256)
    assert limits_that_keep_pace(options(), limits, 2000).max_num_batched_tokens == 512
    assert limits_that_keep_pace(options(), limits, 600).max_num_batched_tokens == 300
    assert limits_that_keep_pace(options(), limits, 1).max_num_batched_tokens == 256
    asked = options(max_num_batched_tokens=512)
    assert limits_that_keep_pace(asked, limits, 1) is limits


@pytest.fixture
def control_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(machine, "CGROUP_ROOT", tmp_path)
    return tmp_path


def test_a_containers_memory_limit_counts_less_what_is_in_use(control_groups: Path) -> None:
    (control_groups / "memory.max").write_text("1000000\n")
    (control_groups / "memory.current").write_text("600000\n")
    (control_groups / "memory.stat").write_text("anon 1\ninactive_file 200000\n")
    assert machine.available_memory() == 600_000


def test_the_older_control_groups_are_read_too(control_groups: Path) -> None:
    memory, cpu = control_groups / "memory", control_groups / "cpu"
    memory.mkdir()
    cpu.mkdir()
    (memory / "memory.limit_in_bytes").write_text("500000")
    (memory / "memory.usage_in_bytes").write_text("100000")
    (cpu / "cpu.cfs_quota_us").write_text("150000")
    (cpu / "cpu.cfs_period_us").write_text("100000")
    assert machine.available_memory() == 400_000
    assert machine.cpu_quota() == 1.5


def test_no_limit_is_no_limit(control_groups: Path) -> None:
    (control_groups / "memory.max").write_text("max\n")
    (control_groups / "cpu.max").write_text("max 100000\n")
    assert machine.memory_limits() == []
    assert machine.cpu_quota() is None
    assert machine.usable_cores() >= 1
