"""``pronk eval`` and ``pronk quantize``: what quantization does to a model, in perplexity."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

if TYPE_CHECKING:
    from model.perplexity import Score

Report: TypeAlias = Callable[[int, int], None]


class EvaluationProblem(RuntimeError):
    """The command cannot go on; the text says why in one line."""


@dataclass(frozen=True)
class Device:
    """Where and in what a model is computed."""

    name: str = "auto"
    dtype: str = "auto"
    threads: int | None = None


@dataclass(frozen=True)
class Measured:
    """One row of the table: a model under one scheme."""

    what: str
    weights: str
    num_bytes: int
    score: Score


def evaluate(model: str | None, texts: list[Path], quantization: str, device: Device) -> None:
    """Perplexity of a model; under a scheme too where one is named. Raises EvaluationProblem."""
    path = _path(model)
    console = Console(stderr=True)
    rows = [measure("as it is", path, texts, "auto", device, console)]
    if quantization != "auto":
        rows.append(measure(quantization, path, texts, quantization, device, console))
    print_table(rows)


def quantize(
    source: str, target: Path, scheme: str, *, force: bool, texts: list[Path] | None, device: Device
) -> None:
    """Writes the quantized checkpoint, then measures both; ``texts`` None: does not measure."""
    from model.checkpoint.writing import write_quantized

    path = _path(source)
    console = Console(stderr=True)
    with _problems(), _bar(console, f"quantizing to {scheme}") as report:
        write_quantized(path, target, scheme, force=force, progress=report)
    before, after = (_weight_bytes(folder) for folder in (path, target))
    Console(highlight=False).print(
        f"{target}: {_in_mebibytes(after)} of weights, {after / before:.0%} of the original's",
        soft_wrap=True,
    )
    if texts is not None:
        rows = [
            measure("before", path, texts, "auto", device, console),
            measure("after", target, texts, "auto", device, console),
        ]
        print_table(rows)


def measure(
    what: str, path: Path, texts: list[Path], scheme: str, device: Device, console: Console
) -> Measured:
    """Loads a model and scores the texts (the bundled one where none is named)."""
    import torch

    from model.checkpoint import load_model
    from model.perplexity import score
    from model.tokenizer import load_tokenizer
    from service.engine.loading import choose_device
    from service.engine.machine import usable_cores

    torch.set_num_threads(device.threads or usable_cores())
    with _problems():
        tokenizer = load_tokenizer(path)
        tokens = [
            tokenizer.encode(text, add_special_tokens=False, parse_special=False)
            for text in _read(texts)
        ]
        with _bar(console, f"loading ({what})") as report:
            model = load_model(
                path,
                dtype=device.dtype,
                device=choose_device(device.name),
                progress=report,
                quantization=scheme,
            )
        with _bar(console, f"scoring ({what})") as report:
            found = score(model, tokens, tokenizer.prefix, report)
    dtype = str(model.dtype).removeprefix("torch.")
    weights = dtype if model.quantization == "none" else model.quantization
    return Measured(what, weights, model.weight_bytes, found)


def print_table(rows: list[Measured]) -> None:
    table = Table("", "weights", "MiB", "tokens", "seconds", "perplexity", box=None, pad_edge=False)
    for row in rows:
        table.add_row(
            row.what,
            row.weights,
            f"{row.num_bytes / (1 << 20):.1f}",
            f"{row.score.num_tokens:,}",
            f"{row.score.seconds:.1f}",
            f"{row.score.perplexity:.4f}",
        )
    console = Console(highlight=False)
    console.print(table)
    if len(rows) == 2:
        before, after = (row.score.perplexity for row in rows)
        console.print(f"perplexity ratio {after / before:.4f}")


def _path(model: str | None) -> Path:
    from model.checkpoint import hub
    from service.backend import ServeProblem, find_model

    try:
        source = find_model(model)
        return source.path or hub.resolve(source.reference)
    except (ServeProblem, ValueError, OSError) as error:
        raise EvaluationProblem(str(error)) from None


def _read(texts: list[Path]) -> list[str]:
    from model.bundled import held_out_text

    try:
        return [file.read_text(encoding="utf-8") for file in texts or [held_out_text()]]
    except UnicodeDecodeError:
        raise EvaluationProblem("the text is not UTF-8") from None


def _weight_bytes(path: Path) -> int:
    from model.checkpoint import inspect

    return inspect(path).num_bytes


def _in_mebibytes(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 20):.1f} MiB"


@contextmanager
def _problems() -> Iterator[None]:
    """What a user can cause becomes one line."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise EvaluationProblem(str(error)) from None


@contextmanager
def _bar(console: Console, what: str) -> Iterator[Report]:
    """A progress bar; nothing where standard error is no terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task(what, total=1.0)
        yield lambda done, total: progress.update(task, completed=done, total=total)
