"""pronk and whichever peers are installed, on the same weights and workloads, in one run.

    python -m tests.benchmarks.compare --shapes 135m 1b --peers-python /tmp/peers/bin/python \\
        --llama-server /tmp/llama-build/bin/llama-server --json compare.json --markdown compare.md

For each workload every server is started, warmed, measured and stopped, in turn, and that for
several rounds: what the machine does meanwhile meets all of them. A server's best round counts,
because the rest of the machine only ever takes. A peer that cannot do a workload is named with its
reason. docs/benchmarks.md says how the peers are installed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
from msgspec import Struct

from model import random_checkpoint
from service.bench import report
from service.bench.load import Level, run
from service.bench.problem import BenchProblem
from service.bench.rates import Rates, describe
from service.bench.report import milliseconds
from service.bench.serve import fit_words
from service.bench.summary import Summary, summarize
from service.bench.workload import Lengths, Workload
from tests.benchmarks.servers import Cannot, Contender, Pronk, Room, Started, Weights, find_peers

LEAST_ROOM = 1024  # tokens: how many a text has is found out with one of so many words:
SAMPLE_WORDS = 200
STORED_BYTES = {"bf16": 2.0, "int8": 34 / 32, "int4": 18 / 32}  # a weight, with its block's scale


@dataclass(frozen=True)
class Case:
    """One workload. ``by_first_token``: judged by TTFT, otherwise by output tokens a second."""

    name: str
    streams: int
    requests: int
    input_len: int
    output_len: int
    shared_prefix: int = 0
    by_first_token: bool = False

    @property
    def room(self) -> Room:
        return Room(self.streams, max(self.input_len + self.output_len, LEAST_ROOM))

    def workload(self, contender: Contender, vocabulary: int) -> Workload:
        return Workload(
            Lengths(self.input_len, self.input_len),
            Lengths(self.output_len, self.output_len),
            self.shared_prefix,
            "ids" if contender.takes_ids else "text",
            vocabulary,
        )

    def shrunk(self, factor: int) -> Case:
        """A rehearsal: shorter by ``factor``, one request a stream."""
        return replace(
            self,
            requests=self.streams,
            input_len=max(2, self.input_len // factor),
            output_len=max(2, self.output_len // factor),
            shared_prefix=self.shared_prefix // factor,
        )

    def __str__(self) -> str:
        streams = "1 stream" if self.streams == 1 else f"{self.streams} streams"
        prefix = f" ({self.shared_prefix} shared)" if self.shared_prefix else ""
        return f"{self.name}: {streams}, {self.input_len}{prefix} in, {self.output_len} out"


CASES = [
    Case("W1", 1, 4, 128, 128),
    Case("W2", 8, 24, 128, 128),
    Case("W3", 32, 64, 128, 64),
    Case("W4", 1, 3, 2048, 16, by_first_token=True),
    Case("W5", 8, 32, 1024 + 64, 32, shared_prefix=1024),
]


class Round(Struct, frozen=True):
    """One server measured once; ``reason`` where it could not be."""

    server: str
    number: int
    rates: Rates
    load: float  # the machine's, before
    summary: Summary | None = None
    peak_memory: int = 0  # bytes
    reason: str = ""


class Comparison(Struct, frozen=True):
    """One row: a workload on a shape at a precision."""

    shape: str
    precision: str
    case: str
    by_first_token: bool
    rounds: list[Round]

    @property
    def servers(self) -> list[str]:
        return list(dict.fromkeys(round.server for round in self.rounds))

    def best(self, server: str) -> Round | None:
        """Its best round, None where it finished none."""
        done = [round for round in self.rounds if round.server == server and round.summary]
        return max(done, key=self.speed, default=None)

    def speed(self, round: Round) -> float:
        """Higher is better."""
        assert round.summary is not None, "not measured"
        if self.by_first_token:
            return 1.0 / (round.summary.ttft.p50 or float("inf"))
        return round.summary.output_tokens_per_second

    def reason(self, server: str) -> str:
        return next((round.reason for round in self.rounds if round.server == server), "")

    def ahead_of(self, server: str) -> float | None:
        """pronk's speed over this server's."""
        own, other = self.best("pronk"), self.best(server)
        if own is None or other is None or not self.speed(other):
            return None
        return self.speed(own) / self.speed(other)

    def best_peer(self) -> str | None:
        peers = [name for name in self.servers if name != "pronk" and self.best(name)]
        return min(peers, key=lambda name: self.ahead_of(name) or float("inf"), default=None)


class Result(Struct, frozen=True):
    command: str
    date: str
    machine: str
    missing: dict[str, str]
    rows: list[Comparison]
    format: int = report.FORMAT


def compare(options: argparse.Namespace, scratch: Path) -> Iterator[Comparison]:
    peers = find_peers(options.peers_python, options.llama_server)
    contenders: list[Contender] = [Pronk(tuple(options.pronk_flags.split())), *peers.contenders]
    contenders = [c for c in contenders if is_wanted(c.name, options.servers)]
    cases = [case for case in CASES if case.name in options.workloads]
    if options.shrink > 1:
        cases = [case.shrunk(options.shrink) for case in cases]
    for shape in options.shapes:
        folder = checkpoint(shape, options.folder or scratch)
        for precision in options.precisions:
            for case in cases:
                rounds = list(
                    measure(case, contenders, Weights(folder, precision), options.rounds, options)
                )
                yield Comparison(shape, precision, str(case), case.by_first_token, rounds)


def is_wanted(name: str, wanted: list[str] | None) -> bool:
    return wanted is None or name == "pronk" or name in wanted


def checkpoint(shape: str, folder: Path) -> Path:
    path = folder / f"random-{shape}"
    if not (path / "tokenizer_config.json").exists():
        random_checkpoint.write(shape, path)
    return path


def measure(
    case: Case,
    contenders: list[Contender],
    weights: Weights,
    num_rounds: int,
    options: argparse.Namespace,
) -> Iterator[Round]:
    """Every server in turn, round by round; one that cannot is not tried again."""
    given_up: set[str] = set()
    for number in range(num_rounds):
        for contender in contenders:
            if contender.name in given_up:
                continue
            load, rates = os.getloadavg()[0], measured_rates()
            try:
                summary, peak = load_once(case, contender, weights, options.limit, number)
                done = Round(contender.name, number, rates, load, summary, peak)
            except (Cannot, BenchProblem) as reason:
                given_up.add(contender.name)
                done = Round(contender.name, number, rates, load, reason=str(reason))
            say(case, weights, done)
            yield done


def load_once(
    case: Case, contender: Contender, weights: Weights, limit: float, number: int
) -> tuple[Summary, int]:
    """(what came of the workload, peak memory). Raises ``Cannot``."""
    vocabulary = json.loads((weights.folder / "config.json").read_text())["vocab_size"]
    with contender.running(weights, case.room, timeout=limit) as started:
        workload = case.workload(contender, vocabulary)
        summary = asyncio.run(_load(case, contender, started, workload, limit, number))
        if summary.num_good < summary.num_requests:
            kinds = [f"{count} {kind}" for kind, count in summary.failures.items()]
            kinds += [f"{summary.num_refused} refused"] if summary.num_refused else []
            example = next(iter(summary.examples.values()), "")
            raise Cannot(f"{', '.join(kinds)} of {summary.num_requests}: {example}")
        return summary, started.peak_memory()


async def _load(
    case: Case,
    contender: Contender,
    started: Started,
    workload: Workload,
    limit: float,
    number: int,
) -> Summary:
    asking, level = contender.asking(), Level("concurrency", case.streams)
    warm = replace(workload, output_len=Lengths(2, 2), shared_prefix=0, input_len=Lengths(32, 32))
    try:
        async with asyncio.timeout(limit):
            workload = await fit_words(started.target, asking, workload, SAMPLE_WORDS)
            await run(started.target, asking, level, warm.jobs(case.streams, stream=99))
        async with asyncio.timeout(limit):
            jobs = workload.jobs(case.requests, stream=number)
            traces, seconds = await run(started.target, asking, level, jobs)
    except TimeoutError:
        raise Cannot(f"not done in {limit:.0f} s") from None
    return summarize(level, traces, seconds)


def measured_rates() -> Rates:
    """In a process of its own: this one shares its cores with the servers and loads no torch."""
    command = [sys.executable, "-m", "service.bench.rates", "--json"]
    output = subprocess.run(command, capture_output=True, check=True).stdout
    return msgspec.json.decode(output, type=Rates)


def say(case: Case, weights: Weights, round: Round) -> None:
    what = round.reason
    if round.summary is not None:
        rate, first = round.summary.output_tokens_per_second, round.summary.ttft.p50
        what = f"{rate:.1f} tok/s, first token after {milliseconds(first)} ms"
    where = f"{weights.folder.name} {weights.precision} {case.name}"
    print(f"{where} round {round.number + 1}, {round.server}: {what}", file=sys.stderr, flush=True)


# ---- the table


HEAD = ("workload", "server", "tok/s", "TTFT p50, ms", "ITL p50 / p99, ms", "peak MB", "pronk is")


def markdown(result: Result) -> str:
    """A table for each shape and precision, what limits them above it."""
    lines = [f"{result.date}; {result.machine}", "", f"    {result.command}", ""]
    for (shape, precision), rows in _grouped(result.rows):
        lines += [f"### {shape}, {precision}", "", _limits(shape, precision, rows), ""]
        lines += [_cells(HEAD), _cells(["---"] * len(HEAD))]
        for row in rows:
            lines += [_cells(cells) for cells in _table_rows(row)]
        lines.append("")
    lines += [f"Not measured: {name} ({reason})." for name, reason in result.missing.items()]
    return "\n".join(lines).rstrip() + "\n"


def _grouped(
    rows: Iterable[Comparison],
) -> Iterator[tuple[tuple[str, str], list[Comparison]]]:
    groups: dict[tuple[str, str], list[Comparison]] = {}
    for row in rows:
        groups.setdefault((row.shape, row.precision), []).append(row)
    yield from groups.items()


def _table_rows(row: Comparison) -> Iterator[list[str]]:
    best_peer = row.best_peer()
    for place, server in enumerate(row.servers):
        label = row.case if place == 0 else ""
        best = row.best(server)
        if best is None:
            yield [label, server, row.reason(server), "", "", "", ""]
            continue
        found = best.summary
        assert found is not None, "a best round was measured"
        ratio = row.ahead_of(server)
        shown = f"{ratio:.2f} times as fast" if ratio and server != "pronk" else ""
        yield [
            label,
            server,
            f"{found.output_tokens_per_second:.1f}",
            milliseconds(found.ttft.p50),
            f"{milliseconds(found.itl.p50)} / {milliseconds(found.itl.p99)}",
            f"{best.peak_memory / 1e6:.0f}",
            f"**{shown}**" if shown and server == best_peer else shown,
        ]


def _limits(shape: str, precision: str, rows: list[Comparison]) -> str:
    """The best rates seen in these rows, and what they allow."""
    seen = [round.rates for row in rows for round in row.rounds]
    rates = Rates(
        max(rate.read_bytes_per_second for rate in seen),
        max(rate.matrix_operations_per_second for rate in seen),
    )
    count = random_checkpoint.num_parameters(shape)
    decode = rates.read_bytes_per_second / (count * STORED_BYTES[precision])
    prefill = rates.matrix_operations_per_second / (2 * count)
    return (
        f"In this run {describe(rates)}: at most {decode:.0f} tok/s at one stream, "
        f"about {prefill:.0f} prompt tok/s."
    )


def _cells(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def read_options(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--shapes", nargs="+", default=["135m"], choices=random_checkpoint.SHAPES)
    parser.add_argument("--precisions", nargs="+", default=["bf16"], choices=STORED_BYTES)
    parser.add_argument(
        "--workloads",
        nargs="+",
        default=[case.name for case in CASES],
        choices=[case.name for case in CASES],
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--servers", nargs="+", help="only these peers, by name")
    parser.add_argument("--peers-python", default=sys.executable, help="where peers are installed")
    parser.add_argument("--llama-server", help="llama.cpp's server; default: the one on the path")
    parser.add_argument("--pronk-flags", default="", help='more for pronk serve: "--threads 2"')
    parser.add_argument("--limit", type=float, default=240.0, help="seconds for one measurement")
    parser.add_argument("--shrink", type=int, default=1, help="a rehearsal, so much shorter")
    parser.add_argument("--folder", type=Path, help="where random checkpoints are kept")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    return parser.parse_args(words)


def main() -> None:
    options = read_options()
    rows: list[Comparison] = []
    with tempfile.TemporaryDirectory(prefix="pronk-compare-") as scratch:
        for row in compare(options, Path(scratch)):
            rows.append(row)
            write(options, rows)  # a long run that is stopped leaves what it has
    print(markdown(result_of(options, rows)))


def result_of(options: argparse.Namespace, rows: list[Comparison]) -> Result:
    missing = find_peers(options.peers_python, options.llama_server).missing
    words = [f'"{word}"' if " " in word else word for word in sys.argv[1:]]
    return Result(
        command=" ".join(["python -m tests.benchmarks.compare", *words]),
        date=report.now(),
        machine=report.machine(),
        missing=missing if options.servers is None else {},
        rows=rows,
    )


def write(options: argparse.Namespace, rows: list[Comparison]) -> None:
    result = result_of(options, rows)
    if options.json:
        report.write_json(result, options.json)
    if options.markdown:
        options.markdown.write_text(markdown(result))


if __name__ == "__main__":
    main()
