"""``pronk doctor``: what this machine offers, which paths pronk would take, and what to change."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

GIB = 1 << 30
WANTED_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16")


@dataclass(frozen=True)
class Finding:
    """One row of the report. ``advice`` is empty where nothing needs changing."""

    what: str
    value: str
    advice: str = ""


def report() -> int:
    """Print the table; 1 when something keeps pronk from serving, else 0."""
    findings = [*_system(), *_processor(), *_memory(), *_torch(), *_packages()]
    table = Table("", "found", "what to change", box=None, pad_edge=False)
    for finding in findings:
        table.add_row(finding.what, finding.value, finding.advice)
    Console().print(table)
    return int(any(finding.advice.startswith("needed") for finding in findings))


def _system() -> list[Finding]:
    from service import __version__

    return [
        Finding("pronk", __version__),
        Finding("python", platform.python_version()),
        Finding("system", f"{platform.system()} {platform.machine()}"),
    ]


def _processor() -> list[Finding]:
    flags = processor_flags()
    cores, usable = os.cpu_count() or 1, usable_cores()
    found = [flag for flag in WANTED_FLAGS if flag in flags]
    advice = ""
    if flags and "avx512_bf16" not in flags and "amx_bf16" not in flags:
        advice = "no bf16 instructions: --dtype float32 is taken on this processor"
    return [
        Finding(
            "cores", f"{usable} usable of {cores}", "" if usable > 1 else "two or more serve better"
        ),
        Finding("instruction sets", " ".join(found) or "unknown", advice),
    ]


def _memory() -> list[Finding]:
    memory = psutil.virtual_memory()
    limit = container_memory_limit()
    text = f"{memory.available / GIB:.1f} GiB free of {memory.total / GIB:.1f}"
    if limit is not None and limit < memory.total:
        text += f", container limit {limit / GIB:.1f}"
    return [
        Finding("memory", text, "" if memory.available > GIB else "free some: models need room")
    ]


def _torch() -> list[Finding]:
    try:
        import torch
    except ImportError:
        return [Finding("torch", "missing", "needed: pip install torch")]
    findings = [
        Finding("torch", torch.__version__, _torch_advice(torch.__version__)),
        Finding("oneDNN", "yes" if torch.backends.mkldnn.enabled else "no"),
        _kernels(),
    ]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            name = torch.cuda.get_device_name(index)
            findings.append(
                Finding(f"cuda:{index}", f"{name}, {free / GIB:.1f} GiB free of {total / GIB:.1f}")
            )
        findings.append(_gpu_attention())
    else:
        built = torch.version.cuda
        advice = "torch has CUDA but sees no device: check the driver" if built else ""
        findings.append(Finding("gpu", "none seen: the CPU serves", advice))
    return findings


def _gpu_attention() -> Finding:
    import torch

    from model.attention import choose_backend

    name = choose_backend("auto", torch.device("cuda"))
    advice = "pip install triton for a faster one" if name == "sdpa" else ""
    return Finding("attention", name, advice)


def _kernels() -> Finding:
    from model.kernels import kernel_status

    usable, why = kernel_status()
    advice = "install a C compiler (gcc), then pronk again" if "compiler" in why else ""
    return Finding("decode kernels", why if usable else f"PyTorch ({why})", advice)


def _torch_advice(version: str) -> str:
    major, minor = (int(part) for part in version.split("+")[0].split(".")[:2])
    return "" if (major, minor) >= (2, 11) else "needed: torch 2.11 or newer"


def _packages() -> list[Finding]:
    from importlib.metadata import PackageNotFoundError, version

    findings = []
    for name in ("fastapi", "uvicorn", "tokenizers", "sentencepiece", "safetensors", "gguf"):
        try:
            findings.append(Finding(name, version(name)))
        except PackageNotFoundError:
            findings.append(Finding(name, "missing", f"needed: pip install {name}"))
    return findings


def processor_flags() -> frozenset[str]:
    """Feature flags as the kernel names them; empty where it does not tell."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    for line in text.splitlines():
        if line.startswith(("flags", "Features")):
            return frozenset(line.partition(":")[2].split())
    return frozenset()


def usable_cores() -> int:
    """Cores this process may run on (affinity), not the machine's."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def container_memory_limit() -> int | None:
    """Bytes the control group allows, None without a limit."""
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(path).read_text().strip()
        except OSError:
            continue
        return int(text) if text.isdigit() else None
    return None
