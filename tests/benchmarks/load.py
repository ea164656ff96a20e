"""Load generator for any OpenAI-compatible ``/v1/completions``: streamed, greedy.

    python -m tests.benchmarks.load http://127.0.0.1:8000 --concurrency 1 8 32 --prompt-tokens 128

Speaks HTTP over plain asyncio streams: on two cores a general client would be what is measured.
Prompts are lists of random token ids, so that every server computes the same number of tokens and
no prompt shares a prefix with another (unless ``--shared-prefix`` says so).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from dataclasses import dataclass, field
from statistics import median
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Workload:
    concurrency: int
    requests: int
    prompt_tokens: int
    output_tokens: int
    vocabulary: int  # ids are drawn below this
    shared_prefix: int = 0
    seed: int = 0


@dataclass
class Trace:
    """Times of one request, seconds on the monotonic clock."""

    start: float
    chunks: list[float] = field(default_factory=list)
    tokens: int = 0
    error: str = ""

    @property
    def first_token(self) -> float:
        return self.chunks[0] - self.start

    @property
    def gaps(self) -> list[float]:
        return [b - a for a, b in zip(self.chunks, self.chunks[1:], strict=False)]


@dataclass(frozen=True)
class Summary:
    tokens_per_second: float
    first_token_p50: float
    first_token_p99: float
    gap_p50: float
    gap_p99: float
    tokens: int
    failed: int

    def row(self) -> str:
        return (
            f"{self.tokens_per_second:9.1f} {1e3 * self.first_token_p50:9.0f} "
            f"{1e3 * self.first_token_p99:9.0f} {1e3 * self.gap_p50:9.1f} "
            f"{1e3 * self.gap_p99:9.1f} {self.tokens:8d} {self.failed:6d}"
        )


HEADER = "    tok/s  TTFT p50  TTFT p99   ITL p50   ITL p99   tokens failed   (ms)"


def prompts(load: Workload) -> list[list[int]]:
    draw = random.Random(load.seed)
    low, high = min(300, load.vocabulary // 2), load.vocabulary

    def ids(count: int) -> list[int]:
        return [draw.randrange(low, high) for _ in range(count)]

    prefix = ids(load.shared_prefix)
    return [prefix + ids(load.prompt_tokens - load.shared_prefix) for _ in range(load.requests)]


async def request(url: str, body: dict[str, object]) -> Trace:
    """Stream one completion and note when each chunk with a choice in it came."""
    target = urlsplit(url)
    payload = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection(target.hostname, target.port)
    trace = Trace(time.monotonic())
    try:
        writer.write(
            f"POST /v1/completions HTTP/1.1\r\nHost: {target.netloc}\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(payload)}\r\n\r\n".encode()
            + payload
        )
        status = await reader.readline()
        if b" 200 " not in status:
            trace.error = status.decode(errors="replace").strip()
            return trace
        await _read_events(reader, trace)
    finally:
        writer.close()
    return trace


async def _read_events(reader: asyncio.StreamReader, trace: Trace) -> None:
    done = False
    async for line in reader:
        if line.startswith(b"data: [DONE]"):
            done = True
            break
        if not line.startswith(b"data: "):
            continue
        if b'"choices":[]' in line or b'"choices": []' in line:
            trace.tokens = json.loads(line[6:])["usage"]["completion_tokens"]
        elif b'"error"' in line:
            trace.error = line.decode(errors="replace").strip()
        else:
            trace.chunks.append(time.monotonic())
    if not done and not trace.error:
        trace.error = "the stream ended without [DONE]"


async def run(url: str, load: Workload, model: str | None = None) -> Summary:
    """Keep ``concurrency`` requests in flight until all are answered."""
    waiting = iter(prompts(load))
    traces: list[Trace] = []

    async def client() -> None:
        for prompt in waiting:
            body: dict[str, object] = {
                "prompt": prompt,
                "max_tokens": load.output_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            if model:
                body["model"] = model
            traces.append(await request(url, body))

    start = time.monotonic()
    await asyncio.gather(*(client() for _ in range(load.concurrency)))
    return summarize(traces, time.monotonic() - start)


def summarize(traces: list[Trace], seconds: float) -> Summary:
    good = [trace for trace in traces if not trace.error and trace.chunks]
    for trace in traces:
        if trace.error:
            print(f"failed: {trace.error}")
    firsts = sorted(trace.first_token for trace in good) or [float("nan")]
    gaps = sorted(gap for trace in good for gap in trace.gaps) or [float("nan")]
    tokens = sum(trace.tokens for trace in good)
    return Summary(
        tokens / seconds,
        median(firsts),
        _percentile(firsts, 0.99),
        median(gaps),
        _percentile(gaps, 0.99),
        tokens,
        len(traces) - len(good),
    )


def _percentile(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("url")
    parser.add_argument("--model")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--requests", type=int, help="default: four times the concurrency")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--shared-prefix", type=int, default=0)
    parser.add_argument("--vocabulary", type=int, default=2000)
    options = parser.parse_args()
    print(f"streams {HEADER}")
    for concurrency in options.concurrency:
        load = Workload(
            concurrency,
            options.requests or 4 * concurrency,
            options.prompt_tokens,
            options.output_tokens,
            options.vocabulary,
            options.shared_prefix,
            seed=concurrency,
        )
        print(f"{concurrency:7d} {asyncio.run(run(options.url, load, options.model)).row()}")


if __name__ == "__main__":
    main()
