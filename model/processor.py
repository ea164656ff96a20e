"""What the processor can do, as Linux tells it. No torch."""

from __future__ import annotations

from pathlib import Path


def processor_features() -> frozenset[str]:
    """Instruction sets by the kernel's names; empty where /proc/cpuinfo does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return frozenset(flags.partition(":")[2].split())
