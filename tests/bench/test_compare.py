"""pronk against its peers: the arithmetic, servers that fail, and the same weights in a GGUF."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
import torch

from model import random_checkpoint
from model.checkpoint import load_model
from service.bench.load import Asking
from service.bench.rates import Rates
from service.bench.summary import Spread, Summary
from tests.benchmarks import compare, gguf_checkpoint
from tests.benchmarks.compare import CASES, Comparison, Result, Round
from tests.benchmarks.servers import Cannot, Contender, Room, Weights, find_peers

ROOT = Path(__file__).resolve().parent.parent.parent
RATES = Rates(2e10, 4e11)
SERVER = """
import asyncio, sys
import json
from tests.bench.scripted_server import Call, answer

async def serve(reader, writer):
    method, path, _ = (await reader.readline()).decode().split()
    length = 0
    while line := (await reader.readline()).decode().strip().lower():
        length = int(line[15:]) if line.startswith("content-length:") else length
    body = json.loads(await reader.readexactly(length)) if length else None
    call = Call(path, {}, body, writer)
    await (call.whole("200 OK", {}) if method == "GET" else answer(call))
    writer.close()

async def main():
    server = await asyncio.start_server(serve, "127.0.0.1", int(sys.argv[1]))
    print("listening", flush=True)
    await server.serve_forever()

asyncio.run(main())
"""
LATE = """
async def late(call):
    await asyncio.sleep(9 if call.body["max_tokens"] > 2 else 0)
    await answer(call)
"""


@dataclass(frozen=True)
class Scripted(Contender):
    """A process that answers, or one that ends with a last word."""

    name: str = "scripted"
    code: str = SERVER

    def command(self, port: int, weights: Weights, room: Room) -> list[str]:
        return [sys.executable, "-c", self.code, str(port)]

    def environment(self) -> dict[str, str]:
        return {"PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoints") / "random-tiny"
    random_checkpoint.write("tiny", path)
    return path


def summary(rate: float, first: float) -> Summary:
    spread = Spread(first, first, first, first, first)
    counts = (8, 8, 0, {}, {}, 1.0, 100, 0, 100)
    return Summary("concurrency", 8, *counts, rate, 8.0, 8.0, spread, spread, spread, spread)


def done(server: str, number: int, rate: float, first: float) -> Round:
    return Round(server, number, RATES, 0.1, summary(rate, first), peak_memory=10**9)


ROUNDS = [
    done("pronk", 0, 100.0, 0.5),
    done("fast", 0, 80.0, 0.25),
    done("slow", 0, 20.0, 1.0),
    Round("broken", 0, RATES, 0.1, reason="it | said no"),
    done("pronk", 1, 120.0, 0.4),
    done("fast", 1, 60.0, 0.3),
    done("slow", 1, 40.0, 2.0),
]


def test_the_best_round_of_each_counts_and_ratios_are_over_the_best_peer() -> None:
    row = Comparison("135m", "bf16", "W2", False, ROUNDS)
    assert row.best_peer() == "fast"
    assert row.ahead_of("fast") == pytest.approx(120 / 80)
    assert row.ahead_of("slow") == pytest.approx(3.0)
    assert row.ahead_of("broken") is None


def test_a_row_judged_by_the_first_token_turns_the_ratio_round() -> None:
    row = Comparison("135m", "bf16", "W4", True, ROUNDS)
    assert row.best_peer() == "fast"
    assert row.ahead_of("fast") == pytest.approx(0.25 / 0.4)
    assert row.ahead_of("slow") == pytest.approx(1.0 / 0.4)


def test_the_table_names_what_could_not_be_measured() -> None:
    rows = [Comparison("135m", "bf16", "W2: x", False, ROUNDS)]
    result = Result("command", "date", "machine", {"vllm": "not installed"}, rows)
    text = compare.markdown(result)
    assert "| W2: x | pronk | 120.0 | 400 | 400 / 400 | 1000 |  |" in text
    assert "|  | fast | 80.0 | 250 | 250 / 250 | 1000 | **1.50 times as fast** |" in text
    assert "|  | broken | it / said no |" in text
    assert "Not measured: vllm (not installed)." in text
    # 20 GB/s over 134.5 million weights of two bytes
    assert "at most 74 tok/s at one stream" in text
    assert msgspec.json.decode(msgspec.json.encode(result), type=Result) == result


def test_where_pronk_itself_could_not_nothing_is_said_to_be_slower() -> None:
    rounds = [Round("pronk", 0, RATES, 0.1, reason="no such flag"), ROUNDS[1]]
    rows = [Comparison("135m", "int8", "W2: x", False, rounds)]
    text = compare.markdown(Result("command", "date", "machine", {}, rows))
    assert "| W2: x | pronk | no such flag |" in text
    assert "|  | fast | 80.0 | 250 | 250 / 250 | 1000 |  |" in text


def test_the_workloads_are_the_five_stated_ones() -> None:
    shapes = [(c.streams, c.input_len, c.output_len, c.shared_prefix) for c in CASES]
    assert shapes == [
        (1, 128, 128, 0),
        (8, 128, 128, 0),
        (32, 128, 64, 0),
        (1, 2048, 16, 0),
        (8, 1088, 32, 1024),
    ]
    assert [case.name for case in CASES if case.by_first_token] == ["W4"]
    assert all(case.requests >= case.streams for case in CASES)


def options(limit: float = 20.0) -> argparse.Namespace:
    return argparse.Namespace(limit=limit)


def test_servers_take_turns_and_one_that_cannot_is_not_tried_again(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.setattr(compare, "measured_rates", lambda: RATES)
    broken = Scripted("broken", "import sys; sys.exit('no such model')")
    case = CASES[1].shrunk(32)
    rounds = list(compare.measure(case, [Scripted(), broken], Weights(folder), 2, options()))
    assert [(r.server, r.number) for r in rounds] == [
        ("scripted", 0),
        ("broken", 0),
        ("scripted", 1),
    ]
    assert rounds[1].reason == "ended with code 1: no such model"
    for found in (rounds[0], rounds[2]):
        assert found.summary is not None
        assert (found.summary.num_good, found.summary.output_tokens) == (8, 8 * 4)
        assert found.peak_memory > 1_000_000


def test_a_server_slower_than_the_limit_is_given_up_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.setattr(compare, "measured_rates", lambda: RATES)
    # the first request and the warm-up ask for 1 and 2 tokens
    slow = LATE + SERVER.replace("else answer(call))", "else late(call))")
    case = CASES[0].shrunk(32)
    rounds = list(compare.measure(case, [Scripted("slow", slow)], Weights(folder), 2, options(0.5)))
    assert len(rounds) == 1
    assert rounds[0].summary is None
    assert rounds[0].reason == "not done in 0 s" or "timeout" in rounds[0].reason


def test_peers_that_are_not_there_are_named(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    found = find_peers(str(python), str(tmp_path / "llama-server"))
    assert found.contenders == []
    assert {"llama.cpp", "transformers", "vllm"} <= set(found.missing)
    assert all(found.missing.values())


@pytest.mark.parametrize("type_name", gguf_checkpoint.TYPES)
def test_a_gguf_file_holds_the_same_weights(folder: Path, tmp_path: Path, type_name: str) -> None:
    path = tmp_path / "tiny.gguf"
    gguf_checkpoint.write(folder, path, type_name)
    device = torch.device("cpu")
    ours = load_model(str(folder), dtype="float32", device=device)
    theirs = load_model(str(path), dtype="float32", device=device, quantization="none")
    tolerance = {"BF16": 0.0, "Q8_0": 0.001, "Q4_0": 0.02}[type_name]  # weights are about 0.02
    own, other = ours.state_dict(), theirs.state_dict()
    assert own.keys() == other.keys()
    for name, weight in own.items():
        torch.testing.assert_close(other[name], weight, rtol=0, atol=tolerance)
    assert theirs.config.vocab_size == ours.config.vocab_size


def test_a_gguf_tokenizer_cuts_text_as_the_checkpoint_s_does(folder: Path, tmp_path: Path) -> None:
    from model.tokenizer import load_tokenizer

    path = tmp_path / "tiny.gguf"
    gguf_checkpoint.write(folder, path, "Q8_0")
    text = "time year people, 12 ways\n day"
    assert load_tokenizer(path).encode(text) == load_tokenizer(folder).encode(text)


def test_each_peer_s_command_names_the_weights_and_the_port(folder: Path) -> None:
    found = find_peers(sys.executable, "/bin/true")
    assert found.contenders[0].name == "llama.cpp"
    for contender in found.contenders:
        words = contender.command(8123, Weights(folder), Room(4, 600))
        assert any("8123" in word for word in words)
        assert any("random-tiny" in word for word in words)
        asked = contender.asking()
        assert isinstance(asked, Asking)
        assert asked.ignore_eos == contender.takes_ignore_eos


def test_a_precision_a_peer_does_not_have_is_refused_by_name(folder: Path) -> None:
    from tests.benchmarks.servers import Transformers

    with pytest.raises(Cannot, match="int4"):
        Transformers(sys.executable).command(1, Weights(folder, "int4"), Room())
