"""The commands ``pronk eval`` and ``pronk quantize``: what they print, write and refuse."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from model.bundled import bundled_model_path
from model.checkpoint import load_model

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = str(bundled_model_path())


def pronk(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "service.cli", *arguments, "--threads", "1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("Once upon a time there was a little girl who lived in a wood. " * 3)
    return str(path)


def perplexities(printed: str) -> list[float]:
    rows = [line.split() for line in printed.splitlines() if re.search(r"\d\.\d{4}$", line.strip())]
    return [float(row[-1]) for row in rows]


def test_eval_prints_the_model_and_its_quantized_self(text: str) -> None:
    done = pronk("eval", "--text", text, "--quantization", "int8")
    assert done.returncode == 0, done.stderr
    before, after, ratio = perplexities(done.stdout)
    assert 1 < before < 100
    assert ratio == pytest.approx(after / before, abs=2e-4)
    assert "int8 weights, groups of 64" in done.stdout
    assert "bfloat16" in done.stdout or "float32" in done.stdout


def test_quantize_writes_a_checkpoint_and_measures_both(text: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = pronk("quantize", WEIGHTS, str(out), "--quantization", "int4", "--text", text)
    assert done.returncode == 0, done.stderr
    assert len(perplexities(done.stdout)) == 3
    assert "of the original's" in done.stdout
    assert "int4" in load_model(out, dtype="float32").quantization
    again = pronk("quantize", WEIGHTS, str(out), "--no-eval")
    assert again.returncode == 1
    assert "is there already" in again.stderr
    assert "Traceback" not in again.stderr
    forced = pronk("quantize", WEIGHTS, str(out), "--no-eval", "--force")
    assert forced.returncode == 0, forced.stderr
    assert not perplexities(forced.stdout)
    assert "int8" in load_model(out, dtype="float32").quantization


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("eval", "no/such/model/here"), "no model at no/such/model/here"),
        (("eval", "--quantization", "fp8", "--device", "cpu"), "use int8 or int4 on a CPU"),
        (("eval", "--dtype", "int3"), "--dtype is"),
        (("eval", "--device", "cuda:77"), "cuda:77 is not there"),
        (("quantize", WEIGHTS, f"{WEIGHTS}/inside"), "may not lie in or around"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(arguments: tuple[str, ...], message: str) -> None:
    done = pronk(*arguments)
    assert done.returncode != 0
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_texts_that_are_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty").write_text("")
    assert "not UTF-8" in pronk("eval", "--text", str(tmp_path / "binary")).stderr
    assert "no token to score" in pronk("eval", "--text", str(tmp_path / "empty")).stderr
