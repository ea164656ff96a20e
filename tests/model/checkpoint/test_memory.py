"""Loading needs little more memory than the weights themselves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gguf
import pytest

from model.checkpoint import inspect
from tests.model.checkpoint.writers import llama, write_gguf, write_huggingface, write_meta

SHAPE = {
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 9,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}  # 32 million weights: 130 MB in float32, of which the largest tensor is 8 MB
LOADING = """
import sys
import torch
from model.checkpoint import load_model
import model.checkpoint.loading

def resident(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

torch.set_num_threads(1)
before = resident("VmRSS")
network = load_model(sys.argv[1], dtype=sys.argv[2], quantization=sys.argv[3])
print(network.weight_bytes, resident("VmHWM") - before)
"""
ALLOWED = 64 << 20  # code first used while loading, and a few of the largest tensors


def peak(path: Path, dtype: str = "float32", quantization: str = "auto") -> tuple[int, int]:
    """Bytes of the weights, and by how much the process grew at most while loading them."""
    done = subprocess.run(
        [sys.executable, "-c", LOADING, str(path), dtype, quantization],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    weights, grown = done.stdout.split()
    return int(weights), int(grown)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("layout", ["huggingface", "meta", "gguf", "gguf-quantized"])
def test_loading_peaks_near_the_size_of_the_weights(layout: str, tmp_path: Path):
    network = llama(**SHAPE)
    if layout == "huggingface":
        write_huggingface(network, tmp_path)
    elif layout == "meta":
        write_meta(network, tmp_path, ranks=2)
    else:
        kind = gguf.GGMLQuantizationType.Q8_0 if layout == "gguf-quantized" else None
        write_gguf(network, tmp_path / "m.gguf", kind or gguf.GGMLQuantizationType.F32)
    weights, grown = peak(tmp_path, quantization="none")
    assert weights > 1.5 * ALLOWED, "too small to tell anything"
    assert grown < weights + ALLOWED, (inspect(tmp_path).num_bytes, weights, grown)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_quantizing_while_loading_never_holds_the_dense_network(quantization: str, tmp_path: Path):
    write_huggingface(llama(**SHAPE), tmp_path)
    weights, grown = peak(tmp_path, quantization=quantization)
    assert weights + ALLOWED < 0.9 * inspect(tmp_path).num_bytes, "too small to tell anything"
    assert grown < weights + ALLOWED, (weights, grown)
