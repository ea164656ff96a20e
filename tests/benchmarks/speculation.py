"""Tokens a second with and without guessing ahead, at several numbers of streams.

    python -m tests.benchmarks.speculation
    python -m tests.benchmarks.speculation --model /path/to/model --draft /path/to/small-model

The engine alone, in this process: scheduler, runner, sampler; no HTTP. Two texts: one that repeats
itself (a negative frequency penalty makes any model do so), which prompt lookup can guess, and the
model's own, where it mostly cannot and should cost nothing. Each line gives the pace of both, taken
in turn, their ratio, and how many of the guesses were right. The texts are compared, too.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

from msgspec.structs import replace

from model.bundled import bundled_model_path
from model.tokenizer import load_tokenizer
from service.engine.loading import Loaded, load, measure_costs, warm_up
from service.engine.messages import SamplingSettings, Submit
from service.engine.options import EngineOptions
from service.engine.worker import make_scheduler

PROMPT = "Once upon a time there was a little dog. The dog was happy. "
TEXTS = {
    "repetitive": SamplingSettings(temperature=0.0, frequency_penalty=-2.0),
    "own, greedy": SamplingSettings(temperature=0.0),
    "own, sampled": SamplingSettings(temperature=0.8),
}
ROUNDS = 3


@dataclass(frozen=True)
class Pace:
    tokens_per_second: float
    num_proposed: int
    num_accepted: int
    texts: list[tuple[int, ...]]


def run(loaded: Loaded, options: EngineOptions, submits: list[Submit], method: str) -> Pace:
    """One scheduler's life, costs measured as the engine does at its start."""
    costs = measure_costs(loaded)
    scheduler = make_scheduler(options, loaded.limits, loaded.num_blocks, costs)
    for submit in submits:
        settings = [
            replace(own, speculative_method=method, num_speculative_tokens=8)
            for own in submit.settings
        ]
        scheduler.add(replace(submit, settings=settings))
    said: dict[int, list[int]] = {submit.id: [] for submit in submits}
    began = time.perf_counter()
    while (step := scheduler.schedule()) is not None:
        for outputs in scheduler.update(step, loaded.runner.run(step)).values():
            for output in outputs:
                said[output.id] += output.tokens
    seconds = time.perf_counter() - began
    counters = scheduler.counters
    return Pace(
        counters.generation_tokens / seconds,
        counters.spec_draft_tokens,
        counters.spec_accepted_tokens,
        [tuple(tokens) for tokens in said.values()],
    )


def compare(
    loaded: Loaded, options: EngineOptions, submits: list[Submit], method: str
) -> tuple[Pace, Pace]:
    """The best of some rounds in turn: the machine's other work only ever slows down."""
    rounds = [
        (run(loaded, options, submits, "none"), run(loaded, options, submits, method))
        for _ in range(ROUNDS)
    ]
    without, guessed = (
        max(paces, key=lambda pace: pace.tokens_per_second) for paces in zip(*rounds, strict=True)
    )
    return without, guessed


def report(loaded: Loaded, options: EngineOptions, arguments: argparse.Namespace) -> None:
    prompt = load_tokenizer(options.model).encode(PROMPT * 4)
    methods = ["ngram", "draft"] if options.speculative_model else ["ngram"]
    print(
        f"{loaded.facts['attention']}, {loaded.facts['dtype']}, {loaded.facts['threads']} threads"
    )
    print("text          method  streams  without     with  ratio   right  same text")
    for text in arguments.texts:
        settings = TEXTS[text]
        for method in methods:
            for streams in arguments.streams:
                submits = [
                    Submit(
                        i,
                        [*prompt, 5 + i],
                        [replace(settings, max_tokens=arguments.tokens, seed=i)],
                    )
                    for i in range(streams)
                ]
                without, guessed = compare(loaded, options, submits, method)
                ratio = guessed.tokens_per_second / without.tokens_per_second
                right = guessed.num_accepted / max(1, guessed.num_proposed)
                print(
                    f"{text:13} {method:6} {streams:8} {without.tokens_per_second:8.0f} "
                    f"{guessed.tokens_per_second:8.0f} {ratio:6.2f} "
                    f"{guessed.num_accepted:6}/{guessed.num_proposed} ({right:.0%}) "
                    f"{'yes' if guessed.texts == without.texts else 'NO'}",
                    flush=True,
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=bundled_model_path())
    parser.add_argument("--draft", type=Path, default=None)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--threads", type=int, default=1, help="one is enough for a small model")
    parser.add_argument("--texts", nargs="+", choices=list(TEXTS), default=list(TEXTS))
    arguments = parser.parse_args()
    options = EngineOptions(
        model=str(arguments.model),
        socket="",
        dtype=arguments.dtype,
        threads=arguments.threads,
        speculative_model=None if arguments.draft is None else str(arguments.draft),
        num_speculative_tokens=8,
        enable_prefix_caching=False,
    )
    loaded = load(options, lambda _: None)
    for _ in warm_up(loaded):
        pass
    report(loaded, options, arguments)


if __name__ == "__main__":
    main()
