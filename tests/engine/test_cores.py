"""Which cores are taken, on machines made of files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from service.engine import cores as cores_module
from service.engine import machine
from service.engine.cores import physical_cores, plan_cores, weights_bytes

GIB = 1 << 30


@pytest.fixture(autouse=True)
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("system", "dev", "groups"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(cores_module, "SYSTEM", tmp_path / "system")
    monkeypatch.setattr(cores_module, "DEVICES", tmp_path / "dev")
    monkeypatch.setattr(machine, "CGROUP_ROOT", tmp_path / "groups")
    return tmp_path


def topology(system: Path, siblings: list[str], nodes: dict[str, float] | None = None) -> range:
    """``siblings[cpu]`` as the kernel lists them; ``nodes``: their cpus and free GiB."""
    for cpu, text in enumerate(siblings):
        folder = system / "system" / "cpu" / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(text + "\n")
    for number, (cpus, free) in enumerate((nodes or {}).items()):
        folder = system / "system" / "node" / f"node{number}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(cpus + "\n")
        kib = int(free * GIB / 1024)
        lines = [f"Node {number} MemFree: {kib // 2} kB", f"Node {number} FilePages: {kib // 2} kB"]
        (folder / "meminfo").write_text("\n".join(lines))
    return range(len(siblings))


def single(count: int) -> list[str]:
    return [str(cpu) for cpu in range(count)]


def paired(count: int) -> list[str]:
    """Hyperthreads numbered as Linux does on most servers: i and i + count share a core."""
    return [f"{cpu % count},{cpu % count + count}" for cpu in range(2 * count)]


def set_quota(system: Path, quota: float) -> None:
    (system / "groups" / "cpu.max").write_text(f"{int(quota * 100_000)} 100000\n")


def test_two_cores_are_both_the_engines_and_nothing_is_pinned(system: Path) -> None:
    plan = plan_cores(allowed=topology(system, single(2)))
    assert (plan.threads, plan.engine, plan.http) == (2, None, None)
    assert "too few" in plan.why


def test_of_four_cores_one_is_kept_for_http(system: Path) -> None:
    plan = plan_cores(allowed=topology(system, single(4)))
    assert (plan.threads, plan.engine, plan.http) == (3, {0, 1, 2}, {3})
    assert "cpu 0-2" in plan.why
    assert "HTTP on cpu 3" in plan.why


def test_hyperthreads_of_a_core_are_one_core(system: Path) -> None:
    plan = plan_cores(allowed=topology(system, paired(8)))
    assert (plan.threads, plan.engine, plan.http) == (7, set(range(7)), {7, 15})
    two = plan_cores(allowed={0, 1, 8, 9})
    assert (two.threads, two.engine) == (2, None)


def test_a_hyperthread_whose_sibling_is_not_ours_counts(system: Path) -> None:
    topology(system, paired(8))
    found = physical_cores({0, 8, 9, 2})
    assert [set(core.cpus) for core in found] == [{0, 8}, {2}, {9}]


def test_without_a_topology_every_processor_is_a_core() -> None:
    assert [set(core.cpus) for core in physical_cores(range(3))] == [{0}, {1}, {2}]


def test_a_quota_bounds_the_threads_and_pins_nothing(system: Path) -> None:
    cpus = topology(system, single(16))
    set_quota(system, 5.5)
    plan = plan_cores(allowed=cpus)
    assert (plan.threads, plan.engine, plan.http) == (5, None, None)
    assert "5.5" in plan.why
    set_quota(system, 2)
    assert plan_cores(allowed=cpus).threads == 2
    set_quota(system, 16)
    assert plan_cores(allowed=cpus).engine == set(range(15))


NODES = {"0-7,16-23": 60.0, "8-15,24-31": 60.0}


def test_a_model_that_fits_stays_on_one_memory_node(system: Path) -> None:
    cpus = topology(system, paired(16), NODES)
    plan = plan_cores(allowed=cpus, model_bytes=16 * GIB)
    assert (plan.threads, plan.engine, plan.http) == (8, set(range(8)), {15, 31})
    assert "memory node 0" in plan.why
    large = plan_cores(allowed=cpus, model_bytes=40 * GIB)
    assert (large.threads, large.engine, large.http) == (15, set(range(15)), {15, 31})


def test_the_node_with_more_of_our_cores_is_taken(system: Path) -> None:
    topology(system, paired(16), NODES)
    plan = plan_cores(allowed=[*range(4), *range(8, 16)])
    assert (plan.engine, plan.http) == (set(range(8, 16)), {3})


def test_threads_asked_for_are_given(system: Path) -> None:
    cpus = topology(system, paired(16), NODES)
    few = plan_cores(3, allowed=cpus)
    assert (few.threads, few.engine, few.http) == (3, {0, 1, 2}, {15, 31})
    more = plan_cores(12, allowed=cpus)
    assert (more.threads, more.engine, more.http) == (12, set(range(12)), {15, 31})
    every = plan_cores(16, allowed=cpus)
    assert (every.threads, every.engine, every.http) == (16, None, None)
    assert plan_cores(1, allowed=range(2)).threads == 1


def test_affinity_can_be_turned_off_and_a_gpu_needs_none(system: Path) -> None:
    cpus = topology(system, single(8))
    off = plan_cores(may_pin=False, allowed=cpus)
    assert (off.threads, off.engine) == (7, None)
    assert "--no-cpu-affinity" in off.why
    assert plan_cores(device="cuda:1", allowed=cpus).engine is None
    assert plan_cores(device="auto", allowed=cpus).engine == set(range(7))
    (system / "dev" / "nvidia0").touch()
    assert plan_cores(device="auto", allowed=cpus).engine is None
    assert plan_cores(device="cpu", allowed=cpus).engine == set(range(7))


def test_weights_are_what_their_files_take(tmp_path: Path) -> None:
    for name, size in (("a.safetensors", 100), ("b.safetensors", 50), ("tokenizer.json", 7)):
        (tmp_path / name).write_bytes(bytes(size))
    assert weights_bytes(tmp_path) == 150
    assert weights_bytes(tmp_path / "a.safetensors") == 100
    assert weights_bytes(tmp_path / "none") == 0


def test_a_process_is_held_to_its_cores_and_goes_on_when_it_cannot_be() -> None:
    cpu = min(os.sched_getaffinity(0))
    code = (
        "import os; from service.engine.cores import hold; hold([100_000]);"
        f"hold([{cpu}]); print(os.sched_getaffinity(0))"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == f"{{{cpu}}}"
