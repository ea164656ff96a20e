"""The Triton product, interpreted on the CPU, and compiled for GPUs that are not here."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

TRITON_MISSING = importlib.util.find_spec("triton") is None
CASES = Path(__file__).with_name("triton_product_cases.py")
ROOT = CASES.parent.parent.parent


@pytest.mark.skipif(TRITON_MISSING, reason="Triton is not installed")
def test_products_equal_the_dense_ones_under_the_interpreter() -> None:
    interpreted = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES)]
    run = subprocess.run(command, cwd=ROOT, env=interpreted, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4_000:] + run.stderr[-2_000:]
    assert "30 passed" in run.stdout


@pytest.mark.skipif(TRITON_MISSING, reason="Triton is not installed")
@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize(("bits", "zeros"), [(8, False), (4, True)])
def test_the_kernel_compiles_for_gpus_that_are_not_here(
    architecture: int, bits: int, zeros: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from model import products_triton

    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    constants = {"BITS": bits, "HAS_ZEROS": zeros, "ROWS": 16, "OUTPUTS": 32, "INPUTS": 32}
    kinds = {
        "x": "*bf16",
        "values": "*u8",
        "scales": "*fp32",
        "zeros": "*u8" if zeros else "*fp32",
        "out": "*bf16",
        **dict.fromkeys(("rows", "outputs", "inputs", "group"), "i32"),
        **dict.fromkeys(constants, "constexpr"),
    }
    kernel = products_triton._product
    signature = {name: kinds[name] for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    compiled = triton.compile(
        source, target=GPUTarget("cuda", architecture, 32), options=products_triton.OPTIONS
    )
    assert compiled.asm["cubin"]
