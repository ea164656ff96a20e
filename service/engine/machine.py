"""What this process may use of the machine: cores and memory, a container's limits included."""

from __future__ import annotations

import math
import os
from pathlib import Path

import psutil

CGROUP_ROOT = Path("/sys/fs/cgroup")
NO_LIMIT = 1 << 60  # cgroup v1 says "none" as a number close to 2^63


def usable_cores() -> int:
    """Cores by affinity, at most what a container's CPU quota rounds up to, at least one."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    quota = cpu_quota()
    return max(1, min(cores, math.ceil(quota)) if quota else cores)


def available_memory() -> int:
    """Bytes that can still be taken without swapping or meeting a container's limit."""
    free = int(psutil.virtual_memory().available)
    return max(0, min([free, *(limit - used for limit, used in memory_limits())]))


def cpu_quota() -> float | None:
    """Cores' worth of time the tightest control group grants, None without a quota."""
    quotas = [_quota_v2(folder) for folder in _groups("")]
    quotas += [_quota_v1(folder) for folder in _groups("cpu")]
    return min((quota for quota in quotas if quota), default=None)


def memory_limits() -> list[tuple[int, int]]:
    """(limit, in use) of every control group above this process that has a limit, in bytes."""
    found = [
        (_number(folder / "memory.max"), _used(folder, "memory.current", "inactive_file"))
        for folder in _groups("")
    ]
    found += [
        (
            _number(folder / "memory.limit_in_bytes"),
            _used(folder, "memory.usage_in_bytes", "total_inactive_file"),
        )
        for folder in _groups("memory")
    ]
    return [(limit, used) for limit, used in found if limit is not None and limit < NO_LIMIT]


def _groups(controller: str) -> list[Path]:
    """Folders of this process's group and those above it; "" is the unified hierarchy (v2).

    Inside a container the path of /proc/self/cgroup may be the host's: folders that are not there
    are skipped, and the root, which then is the container's own group, is always among them.
    """
    root = CGROUP_ROOT / controller
    path = _group_path(controller)
    folders = [root / part for part in [path, *path.parents]] if path else [root]
    return [folder for folder in folders if folder.is_dir()]


def _group_path(controller: str) -> Path | None:
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            return Path(path.lstrip("/"))
    return None


def _used(folder: Path, usage: str, reclaimable: str) -> int:
    """Bytes in use less the file cache that the kernel would give back first."""
    used = _number(folder / usage) or 0
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
    except OSError:
        return used
    stats = dict(line.split(" ", 1) for line in lines if " " in line)
    return max(0, used - int(stats.get(reclaimable, 0)))


def _quota_v2(folder: Path) -> float | None:
    text = _text(folder / "cpu.max").split()
    if len(text) != 2 or not text[0].isdigit():
        return None
    return int(text[0]) / int(text[1])


def _quota_v1(folder: Path) -> float | None:
    quota, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
    return quota / period if quota and period else None


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text.isdigit() else None


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
