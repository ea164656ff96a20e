"""Trains the bundled model: `python -m model.bundled.train --corpus DIR --out DIR`.

Reads the books, generates stories and dialogues, trains a tokenizer and a small Llama, and exports
a Hugging Face folder. Run it again with the same `--out` to go on from the last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import sentencepiece
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from model.bundled.corpus import (
    EARLY,
    LATE,
    Books,
    Source,
    held_out_rows,
    read_books,
    train_tokenizer,
)
from model.bundled.export import export
from model.bundled.optimizer import Optimizer, rate_scale

FULL = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
}
CONTEXT = 1024
LONG_ROWS_EVERY = 12
LATE_FROM = 0.5

Loss = Callable[[Tensor], Tensor]


@dataclass
class Run:
    """What a checkpoint carries beside the weights. `done` is the share of the run, 0 to 1."""

    step: int = 0
    seconds: float = 0.0
    tokens: int = 0
    done: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)


def build_network(tiny: bool, vocab_size: int) -> LlamaForCausalLM:
    shape = (TINY if tiny else FULL) | {"vocab_size": vocab_size}
    config = LlamaConfig(
        **shape,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        use_cache=False,
        initializer_range=0.02,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16)


def make_loss(network: LlamaForCausalLM, compiled: bool) -> Loss:
    def loss(rows: Tensor) -> Tensor:
        logits = network(input_ids=rows[:, :-1]).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())

    return torch.compile(loss, dynamic=False) if compiled else loss


def batches(source: Source, tokens_per_step: int, length: int) -> Iterator[Tensor]:
    """Mostly rows of `length`; every twelfth batch is as long as the context."""
    count = 0
    while True:
        count += 1
        long = length == 512 and count % LONG_ROWS_EVERY == 0
        size = CONTEXT if long else length
        yield torch.tensor([source.row(size + 1) for _ in range(tokens_per_step // size)])


@torch.no_grad()
def held_out_losses(loss: Loss, rows: dict[str, list[list[int]]]) -> dict[str, float]:
    return {kind: loss(torch.tensor(some)).item() for kind, some in rows.items()}


def train(options: argparse.Namespace) -> None:
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    work: Path = options.out / "work"
    work.mkdir(parents=True, exist_ok=True)
    books = read_books(options.corpus)
    pieces = tokenizer_for(books, work, options)
    network = build_network(options.tiny, pieces.vocab_size())
    optimizer = Optimizer(network, options.rate)
    run = restore(work, optimizer)
    run.done = share_done(run, options)
    length = 64 if options.tiny else 512
    held_out = held_out_rows(Source(books, pieces, options.seed + 1), length + 1, 8)
    source = Source(books, pieces, options.seed + 1000 + run.step)
    loss = make_loss(network, options.compile)
    started = time.monotonic() - run.seconds
    saved = time.monotonic()
    with progress_bar() as progress:
        bar = progress.add_task("", total=1.0, step=run.step, loss=0, speed=0)
        for rows in batches(source, options.batch_tokens, length):
            if run.done >= 1.0:
                break
            source.mixture = EARLY if run.done < LATE_FROM else LATE
            value = loss(rows)
            value.backward()  # type: ignore[no-untyped-call]
            optimizer.step(rate_scale(run.step, run.done))
            run.step += 1
            run.tokens += rows.numel() - rows.shape[0]
            run.seconds = time.monotonic() - started
            run.done = share_done(run, options)
            run.history.append({"step": run.step, "tokens": run.tokens, "train": value.item()})
            speed = run.tokens / run.seconds
            progress.update(bar, completed=run.done, step=run.step, loss=value.item(), speed=speed)
            if run.done >= 1.0 or time.monotonic() - saved > options.save_minutes * 60:
                saved = time.monotonic()
                run.history[-1] |= held_out_losses(make_loss(network, compiled=False), held_out)
                progress.console.print(report(run))
                checkpoint(work, run, optimizer)
                export(network, work / "tokenizer.model", options.out / "weights")
    draw_curve(run.history, options.out / "loss.svg")


def progress_bar() -> Progress:
    return Progress(
        TextColumn("step {task.fields[step]}"),
        BarColumn(),
        TextColumn("{task.percentage:.0f}%"),
        TimeElapsedColumn(),
        TextColumn("loss {task.fields[loss]:.3f} {task.fields[speed]:.0f} tok/s"),
    )


def share_done(run: Run, options: argparse.Namespace) -> float:
    """By the clock where minutes are given, so that a busy machine still ends on time."""
    share: float = run.step / options.steps
    if options.minutes:
        share = run.seconds / (60 * options.minutes)
    return min(1.0, share)


def report(run: Run) -> str:
    last = {name: round(value, 3) for name, value in run.history[-1].items()}
    return f"{last} {run.seconds:.0f} s, {run.tokens / run.seconds:.0f} tok/s, {run.done:.1%}"


def tokenizer_for(
    books: Books, work: Path, options: argparse.Namespace
) -> sentencepiece.SentencePieceProcessor:
    path = work / "tokenizer.model"
    if not path.exists():
        vocab_size = (TINY if options.tiny else FULL)["vocab_size"]
        train_tokenizer(books, path, vocab_size, options.seed)
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


def checkpoint(work: Path, run: Run, optimizer: Optimizer) -> None:
    torch.save({"run": vars(run), "optimizer": optimizer.state()}, work / "checkpoint.tmp")
    (work / "checkpoint.tmp").replace(work / "checkpoint.pt")
    (work / "history.json").write_text(json.dumps(run.history))


def restore(work: Path, optimizer: Optimizer) -> Run:
    if not (work / "checkpoint.pt").exists():
        return Run()
    saved = torch.load(work / "checkpoint.pt", weights_only=True)
    optimizer.restore(saved["optimizer"])
    return Run(**saved["run"])


def draw_curve(history: list[dict[str, float]], path: Path) -> None:
    try:
        from matplotlib import pyplot
    except ImportError:
        return
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    width = max(1, len(history) // 200)
    mean = [
        sum(point["train"] for point in history[at : at + width]) / len(history[at : at + width])
        for at in range(0, len(history), width)
    ]
    axes.plot([p["tokens"] / 1e6 for p in history[::width]], mean, label="training", alpha=0.5)
    for kind in ("books", "stories", "dialogues"):
        points = [p for p in history if kind in p]
        axes.plot(
            [p["tokens"] / 1e6 for p in points],
            [p[kind] for p in points],
            ".-",
            label=f"held out: {kind}",
        )
    axes.set(xlabel="million tokens", ylabel="loss (nats per token)", ylim=(0, 6))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", type=Path, required=True, help="a folder of .txt files")
    parser.add_argument("--out", type=Path, required=True, help="gets weights/, work/, loss.svg")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--minutes", type=float, help="end after so long, whatever the steps")
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save-minutes", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile; needs a C++ compiler"
    )
    parser.add_argument("--tiny", action="store_true", help="a toy network, for the tests")
    return parser.parse_args(arguments)


def main() -> None:
    train(parse())


if __name__ == "__main__":
    main()
