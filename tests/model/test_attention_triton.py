"""The Triton kernels, interpreted on the CPU. In a process of their own: Triton reads its switch
when it is imported, and must stay what it is for every other test."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

TRITON_MISSING = importlib.util.find_spec("triton") is None
CASES = Path(__file__).with_name("triton_attention_cases.py")
ROOT = CASES.parent.parent.parent


@pytest.mark.skipif(TRITON_MISSING, reason="Triton is not installed")
def test_triton_attention_equals_plain_attention_under_the_interpreter() -> None:
    interpreted = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES)]
    run = subprocess.run(command, cwd=ROOT, env=interpreted, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4_000:] + run.stderr[-2_000:]


@pytest.mark.skipif(TRITON_MISSING, reason="Triton is not installed")
@pytest.mark.parametrize(
    ("architecture", "head_size", "page", "stored"),
    [
        (80, 64, 256, "bf16"),
        (90, 128, 16, "bf16"),
        (80, 64, 256, "u8"),
        (90, 128, 256, "fp8e4nv"),
        (80, 64, 256, "i8"),
        (90, 128, 256, "i8"),
    ],
)
def test_kernels_compile_for_gpus_that_are_not_here(
    architecture: int,
    head_size: int,
    page: int,
    stored: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Down to machine code, in bfloat16 over pages of every kind (e4m3 as bytes where the hardware
    does not know it), and within the shared memory every such GPU has."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from model import attention_triton as kernels

    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    shape = {"HEAD": head_size, "HEAD_PAD": head_size}
    walk = {"WINDOW": 0, "GROUP": 4, "PAGE": page, "KEYS": 64}
    walk |= {"FP8_CODES": stored == "u8", "SCALED": stored == "i8"}
    constants = {
        kernels._decode_split: {**shape, **walk, "GROUP_PAD": 16, "SPLIT": 512},
        kernels._merge_splits: {**shape, "WINDOW": 0, "SPLIT": 512, "SPLITS": 16},
        kernels._prefill_chunk: {**shape, **walk, "GROUP_PAD": 4, "QUERIES": 16},
    }
    for kernel, fixed in constants.items():
        signature = {name: argument_type(name, fixed, stored) for name in kernel.arg_names}
        source = ASTSource(fn=kernel, signature=signature, constexprs=fixed)
        options = {**kernels._OPTIONS, "num_warps": 4}
        compiled = triton.compile(
            source, target=GPUTarget("cuda", architecture, 32), options=options
        )
        assert compiled.asm["cubin"]
        assert compiled.metadata.shared <= 99 * 1024


def argument_type(name: str, constants: dict[str, int], stored: str) -> str:
    if name in constants:
        return "constexpr"
    if name in ("k_pages", "v_pages"):
        return f"*{stored}"
    if name in ("q", "out"):
        return "*bf16"
    if name in ("partial", "weights", "k_scales", "v_scales"):
        return "*fp32"
    if name in ("tables", "contexts", "query_starts"):
        return "*i32"
    return "fp32" if name == "scale" else "i32"
