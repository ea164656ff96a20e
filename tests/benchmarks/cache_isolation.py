"""What a clock tells of another key's prompts: ``python -m tests.benchmarks.cache_isolation``.

A real server with two keys. For each round a prompt nobody sent before; its time to the first token
when it is cold, when the same key sends it again, when another key sends it, and, for what noise
is, when another key sends one that nobody sent. If the last two differ, the cache leaks. Rounds
are in turn, so that a machine that grows slow is slow for all.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from model.random_checkpoint import SHAPES, write
from service.bench.client import Target, Trace, stream
from tests.running import serving

KEYS = ("key-of-the-victim", "key-of-the-attacker")
COLD = "a key, cold"
WARM = "the same key again"
ACROSS = "another key, the same text"
OTHER = "another key, a text nobody sent"


@dataclass
class Found:
    seconds: list[float] = field(default_factory=list)
    cached: int = 0

    def note(self, trace: Trace) -> None:
        if not trace.is_good:
            raise SystemExit(f"a request failed: {trace.failure} {trace.detail}")
        self.seconds.append(trace.first_token)
        self.cached += trace.cached_tokens

    @property
    def quartiles(self) -> list[float]:
        return [1e3 * value for value in statistics.quantiles(self.seconds, n=4)]


async def measure(url: str, vocabulary: int, tokens: int, rounds: int) -> dict[str, Found]:
    found = {name: Found() for name in (COLD, WARM, ACROSS, OTHER)}
    victim, attacker = (Target(url, key) for key in KEYS)
    dice = random.Random(0)

    async def ask(name: str, target: Target, prompt: list[int]) -> None:
        body = {"prompt": prompt, "max_tokens": 1, "stream": True, "ignore_eos": True}
        body |= {"stream_options": {"include_usage": True}}
        found[name].note(await stream(target, "/v1/completions", body))

    def prompt() -> list[int]:
        return [dice.randrange(3, vocabulary) for _ in range(tokens)]

    await stream(victim, "/v1/completions", {"prompt": prompt(), "max_tokens": 1, "stream": True})
    for _ in range(rounds):
        secret = prompt()
        await ask(COLD, victim, secret)
        await ask(WARM, victim, secret)
        asked = [(ACROSS, secret), (OTHER, prompt())]
        for name, text in dice.sample(asked, 2):
            await ask(name, attacker, text)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=[*SHAPES], default="135m")
    parser.add_argument("--tokens", type=int, default=512, help="of each prompt")
    parser.add_argument("--rounds", type=int, default=12)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write(given.shape, Path(folder))
        vocabulary = int(str(SHAPES[given.shape]["vocab_size"]))
        with serving(folder, "--no-sample", PRONK_API_KEY=",".join(KEYS)) as server:
            work = measure(server.url, vocabulary, given.tokens, given.rounds)
            found = asyncio.run(work)
    title = f"time to first token, ms; {given.shape}, {given.tokens} tokens, {given.rounds} rounds"
    table = Table("", "25 %", "median", "75 %", "cached tokens", title=title)
    for name, one in found.items():
        table.add_row(name, *(f"{value:.1f}" for value in one.quartiles), str(one.cached))
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
