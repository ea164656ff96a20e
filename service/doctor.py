"""``pronk doctor``: what this machine offers, which paths pronk would take, and what to change."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass

import psutil
from rich.console import Console
from rich.table import Table

from model.processor import processor_features
from service.engine.cores import plan_cores
from service.engine.machine import available_memory, memory_limits

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
    flags = processor_features()
    hyperthreads, plan = os.cpu_count() or 1, plan_cores(device="auto")
    advice_on_cores = "" if plan.threads > 1 else "two or more serve better"
    found = [flag for flag in WANTED_FLAGS if flag in flags]
    advice = ""
    if flags and "avx512_bf16" not in flags and "amx_bf16" not in flags:
        advice = "no bf16 instructions: --dtype float32 is taken on this processor"
    return [
        Finding(
            "cores",
            f"{plan.threads} threads of {hyperthreads} processors: {plan.why}",
            advice_on_cores,
        ),
        Finding("instruction sets", " ".join(found) or "unknown", advice),
    ]


def _memory() -> list[Finding]:
    memory = psutil.virtual_memory()
    free = available_memory()
    text = f"{free / GIB:.1f} GiB free of {memory.total / GIB:.1f}"
    if limit := min((limit for limit, _ in memory_limits()), default=0):
        text += f", container limit {limit / GIB:.1f}"
    return [Finding("memory", text, "" if free > GIB else "free some: models need room")]


def _torch() -> list[Finding]:
    try:
        import torch
    except ImportError:
        return [Finding("torch", "missing", "needed: pip install torch")]
    findings = [
        Finding("torch", torch.__version__, _torch_advice(torch.__version__)),
        Finding("oneDNN", "yes" if torch.backends.mkldnn.enabled else "no"),
        _kernels(),
        _quantization(),
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
    return Finding("kernels", why if usable else f"PyTorch ({why})", advice)


def _quantization() -> Finding:
    """Which schemes pay here: fp8 needs a GPU that multiplies it."""
    import torch

    schemes = ["int8", "int4"]
    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9):
        schemes.append("fp8")
    return Finding("--quantization", ", ".join(schemes))


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
