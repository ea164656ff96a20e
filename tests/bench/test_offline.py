"""``pronk bench``: the real engine, in this process, on a tiny shape."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
import torch
from typer.testing import CliRunner, Result

from model import random_checkpoint
from service.bench import rates
from service.bench.offline import OfflineReport, summarize
from service.bench.rates import Rates, matrix_rate, read_bandwidth
from service.bench.steps import TimedStep
from service.cli import app


def bench(*words: str) -> Result:
    return CliRunner().invoke(app, ["bench", *words])


@pytest.fixture(autouse=True)
def few_threads() -> object:
    """The engine sets them for the whole process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def known_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring them takes seconds."""
    monkeypatch.setattr(rates, "measure", lambda device: Rates(2e10, 4e11))


@pytest.mark.usefixtures("known_rates")
def test_a_tiny_shape_is_measured_and_written(tmp_path: Path) -> None:
    written = tmp_path / "result.json"
    words = ("--input-len", "20", "--output-len", "6", "--concurrency", "1,3", "--num-prompts", "5")
    result = bench("--shape", "tiny", *words, "--dtype", "float32", "--json", str(written))
    assert result.exit_code == 0, result.output
    report = msgspec.json.decode(written.read_bytes(), type=OfflineReport)
    assert report.facts["dtype"] == "float32", "the engine's settings are pronk serve's"
    assert report.weight_bytes == 4 * random_checkpoint.num_parameters("tiny")
    for found, concurrency in zip(report.results, (1, 3), strict=True):
        assert (found.concurrency, found.num_prompts) == (concurrency, 5)
        assert (found.prompt_tokens, found.output_tokens) == (100, 30)
        assert found.output_tokens_per_second == pytest.approx(30 / found.seconds)
        assert found.decode_step is not None
        assert found.decode_limit is not None
        assert found.limit_share == pytest.approx(found.decode_limit / found.decode_step)
        parts = found.decode_parts
        assert parts is not None
        assert all(share > 0 for share in msgspec.structs.astuple(parts))
        assert sum(msgspec.structs.astuple(parts)) == pytest.approx(1.0)
        assert 0 < parts.between_calls < 1
    assert "of the limit" in result.stdout


@pytest.mark.usefixtures("known_rates")
def test_the_bundled_model_is_the_default() -> None:
    result = bench("--concurrency", "2", "--input-len", "8", "--output-len", "3")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("pronk: bfloat16 on cpu")


@pytest.mark.usefixtures("known_rates")
@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--shape", "huge"), "no shape 'huge'"),
        (("--shape", "tiny", "--concurrency", "0"), "at least 1"),
        (("/nowhere/model",), "no model at /nowhere/model"),
        (("--shape", "tiny", "--max-num-seqs", "2", "--concurrency", "4"), "--max-num-seqs 4"),
        (("--shape", "tiny", "--input-len", "5000"), "context"),
        (("--shpae", "tiny"), "--shpae"),
        (("model", "--shape", "tiny"), "a model or --shape"),
    ],
)
def test_what_cannot_be_run_is_one_clear_line(words: tuple[str, ...], says: str) -> None:
    result = bench(*words)
    assert result.exit_code != 0
    assert says in result.stderr
    assert "Traceback" not in result.output


def step(seconds: float, rows: int, tokens: int, is_decode: bool) -> TimedStep:
    """Half of it in the network."""
    parts = (0.1 * seconds, 0.6 * seconds, 0.5 * seconds, 0.2 * seconds, 0.1 * seconds)
    return TimedStep(
        *parts, num_drawn=rows, num_tokens=tokens, num_rows=rows, context=1000, is_decode=is_decode
    )


class _Config:
    num_layers, num_kv_heads, head_size = 2, 2, 16


class _Model:
    config, dtype, weight_bytes = _Config, torch.bfloat16, 1_000_000


class _Loaded:
    class runner:
        model = _Model


def test_known_steps_give_known_numbers() -> None:
    steps = [
        step(0.4, 2, 200, is_decode=False),
        step(0.1, 1, 1, is_decode=True),  # not at full width
        *[step(0.010, 4, 4, is_decode=True) for _ in range(9)],
        step(0.5, 4, 4, is_decode=True),  # the machine was elsewhere
    ]
    found = summarize(steps, _Loaded, Rates(1e9, 1e12), 4, (4, 198), 2.0)  # type: ignore[arg-type]
    assert found.prefill_tokens_per_second == pytest.approx(500.0)
    assert found.decode_step == pytest.approx(0.010)
    assert found.decode_tokens_per_second == pytest.approx(400.0)
    assert found.output_tokens == 2 + 1 + 40
    # 1 MB of weights and 1,000 tokens of 2 * 2 layers * 2 heads * 16 numbers of 2 bytes, at 1 GB/s
    assert found.decode_limit == pytest.approx(0.001 + 1000 * 256e-9)
    assert found.limit_share == pytest.approx(0.1256)
    parts = found.decode_parts
    assert parts is not None
    assert parts.between_calls == pytest.approx(0.5)
    assert parts.prepare == pytest.approx(0.1)


def test_without_a_decode_step_nothing_is_said_of_decoding() -> None:
    steps = [step(0.4, 2, 200, is_decode=False)]
    found = summarize(steps, _Loaded, Rates(1e9, 1e12), 4, (4, 198), 2.0)  # type: ignore[arg-type]
    assert (found.decode_step, found.decode_parts, found.limit_share) == (None, None, None)


def test_the_machine_s_rates_are_positive() -> None:
    assert read_bandwidth(gigabytes=0.01, repeats=1) > 1e8
    assert matrix_rate(repeats=1) > 1e9


@pytest.mark.parametrize("shape", ["tiny"])
def test_a_random_checkpoint_is_the_shape_it_says(tmp_path: Path, shape: str) -> None:
    from model.checkpoint import load_model

    random_checkpoint.write(shape, tmp_path)
    model = load_model(str(tmp_path), dtype="auto", device=torch.device("cpu"))
    assert model.num_parameters == random_checkpoint.num_parameters(shape)
    assert json.loads((tmp_path / "config.json").read_text())["vocab_size"] == 2048
