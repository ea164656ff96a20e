"""Which cores the engine computes on and which one the HTTP process keeps to.

A step is as slow as its slowest thread, so a thread must share its core with nobody: not with its
hyperthread sibling, not with the HTTP process, and not with memory on another socket in between.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from service.engine.machine import cpu_quota

SYSTEM = Path("/sys/devices/system")
DEVICES = Path("/dev")
ENOUGH_TO_SPARE_ONE = 4  # cores; with fewer, one less for the engine costs more than it brings
KIB = 1024

Cpus = frozenset[int]  # as the system numbers them: hyperthreads, not cores


@dataclass(frozen=True)
class CorePlan:
    """``engine`` and ``http`` are what each process is held to; None leaves it to the system."""

    threads: int
    why: str
    engine: Cpus | None = None
    http: Cpus | None = None


@dataclass(frozen=True)
class Core:
    cpus: Cpus  # its hyperthreads that this process may use
    node: int  # of memory


def plan_cores(
    threads: int | None = None,
    *,
    may_pin: bool = True,
    device: str = "cpu",
    model_bytes: int = 0,
    allowed: Iterable[int] | None = None,
) -> CorePlan:
    """``threads`` is the operator's wish; ``model_bytes`` what one memory node would have to hold.

    Physical cores are counted, a container's quota bounds them, and with four or more the HTTP
    process gets one to itself. Nothing is pinned under a quota (it counts time, not cores), nor
    beside a GPU (the engine's host work is one thread).
    """
    cores = physical_cores(_allowed() if allowed is None else allowed)
    quota = cpu_quota()
    most = min(len(cores), math.ceil(quota)) if quota else len(cores)
    if threads is not None and threads >= most:
        return CorePlan(threads, f"{threads} threads as asked, on {_cores(most)}: none is spared")
    if most < ENOUGH_TO_SPARE_ONE:
        return CorePlan(threads or most, f"{_cores(most)}: too few to keep one for HTTP")
    wanted = threads or most - 1
    reason = _reason_not_to_pin(may_pin, device, quota, len(cores), most)
    if reason:
        return CorePlan(wanted, f"{wanted} of {_cores(most)}, not pinned: {reason}")
    return _pinned(cores, threads, model_bytes)


def physical_cores(allowed: Iterable[int]) -> list[Core]:
    """In the system's order; a hyperthread whose core is not told is a core of its own."""
    allowed, nodes = set(allowed), _nodes()
    found: dict[Cpus, Core] = {}
    for cpu in sorted(allowed):
        siblings = SYSTEM / "cpu" / f"cpu{cpu}" / "topology" / "thread_siblings_list"
        cpus = frozenset(_cpu_list(siblings) or {cpu}) & allowed | {cpu}
        node = next((number for number, members in nodes.items() if cpu in members), 0)
        found.setdefault(frozenset(cpus), Core(frozenset(cpus), node))
    return list(found.values())


def weights_bytes(path: Path) -> int:
    """Roughly what the weights of a checkpoint take: its files' size; 0 where nothing is there."""
    if path.is_file():
        return path.stat().st_size
    kinds = ("*.safetensors", "*.pth", "*.gguf")
    return sum(file.stat().st_size for kind in kinds for file in path.glob(kind))


def hold(cpus: Iterable[int]) -> None:
    """Keep this thread, and those it starts from now on, to ``cpus``. Best effort."""
    if hasattr(os, "sched_setaffinity"):
        try:
            os.sched_setaffinity(0, cpus)
        except OSError:
            return  # they were taken away meanwhile: the system places the threads


def _pinned(cores: list[Core], threads: int | None, model_bytes: int) -> CorePlan:
    """The engine on one hyperthread of each of its cores, HTTP on a core beside them."""
    near = _on_one_node(cores, threads or ENOUGH_TO_SPARE_ONE, model_bytes)
    far = [core for core in cores if core not in near]
    http = far[-1] if far else near.pop()
    engine = near[:threads]
    held = frozenset(min(core.cpus) for core in engine)
    where = f" of memory node {engine[0].node}" if far else ""
    why = f"{_cores(len(engine))}{where} (cpu {_spelled(held)}), HTTP on cpu {_spelled(http.cpus)}"
    return CorePlan(len(engine), why, held, http.cpus)


def _on_one_node(cores: list[Core], least: int, model_bytes: int) -> list[Core]:
    """The cores of the largest node, if it has enough and its free memory holds the model."""
    by_node: dict[int, list[Core]] = {}
    for core in cores:
        by_node.setdefault(core.node, []).append(core)
    node, own = max(by_node.items(), key=lambda item: (len(item[1]), _free_bytes(item[0])))
    fits = _free_bytes(node) > 2 * model_bytes  # weights and a cache beside them
    return own if fits and len(own) >= least else list(cores)


def _reason_not_to_pin(
    may_pin: bool, device: str, quota: float | None, num_cores: int, most: int
) -> str:
    if not may_pin:
        return "--no-cpu-affinity"
    if quota is not None and most < num_cores:
        return f"a quota of {quota:g} cores floats over them"
    if device.startswith("cuda") or (device == "auto" and has_gpu()):
        return "a GPU computes"
    return "" if hasattr(os, "sched_setaffinity") else "this system has no affinity"


def has_gpu() -> bool:
    """Whether an NVIDIA device is there, as far as one can tell without torch."""
    return any(DEVICES.glob("nvidia[0-9]*"))


def _allowed() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def _nodes() -> dict[int, set[int]]:
    folders = (SYSTEM / "node").glob("node[0-9]*")
    return {int(folder.name[4:]): _cpu_list(folder / "cpulist") for folder in folders}


def _free_bytes(node: int) -> int:
    """Free, or holding files that the kernel would drop first."""
    try:
        lines = (SYSTEM / "node" / f"node{node}" / "meminfo").read_text().splitlines()
    except OSError:
        return 0
    fields = {words[2]: int(words[3]) for words in map(str.split, lines) if len(words) > 3}
    return KIB * (fields.get("MemFree:", 0) + fields.get("FilePages:", 0))


def _cpu_list(path: Path) -> set[int]:
    """``0-3,8`` as the system writes it; empty where it does not say."""
    try:
        text = path.read_text().strip()
    except OSError:
        return set()
    ranges = [part.split("-") for part in text.split(",") if part]
    return {cpu for ends in ranges for cpu in range(int(ends[0]), int(ends[-1]) + 1)}


def _spelled(cpus: Cpus) -> str:
    """{0, 1, 2, 8} -> 0-2,8."""
    parts: list[list[int]] = []
    for cpu in sorted(cpus):
        if parts and cpu == parts[-1][-1] + 1:
            parts[-1].append(cpu)
        else:
            parts.append([cpu])
    return ",".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)


def _cores(count: int) -> str:
    return "1 core" if count == 1 else f"{count} cores"
