"""The command ``pronk``: serve, keys, usage, top, batch, chat, quantize, eval, bench, doctor.

Torch is imported only inside a command.
"""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from service import __version__
from service.bench.cli import app as bench
from service.keys.cli import app as keys

app = typer.Typer(
    name="pronk",
    help="Serve a Llama-family model over HTTP.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

app.add_typer(bench, name="bench")
app.add_typer(keys, name="keys")

PASS_THROUGH = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}


@app.command(context_settings=PASS_THROUGH, add_help_option=False)
def serve(context: typer.Context) -> None:
    """Serve a model over HTTP: pronk serve [MODEL]; all settings: pronk serve --help."""
    from service.settings import SettingsProblem, read_settings

    try:
        settings = read_settings(context.args)
    except SettingsProblem as problem:
        fail(f"{problem}\nAll settings: pronk serve --help", code=2)
    from service.backend import ServeProblem
    from service.serve import serve_until_stopped

    try:
        code = serve_until_stopped(settings)
    except ServeProblem as problem:
        fail(str(problem))
    raise typer.Exit(code)


@app.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def batch(
    context: typer.Context,
    requests: Annotated[
        Path,
        typer.Argument(
            metavar="INPUT", help="A request a line: custom_id, method, url, body", dir_okay=False
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Answers are added to it; default: INPUT.output.jsonl"),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The model to load; default: the bundled one")
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(help="Send to a running server instead, e.g. http://127.0.0.1:8000"),
    ] = None,
    api_key: Annotated[
        str, typer.Option(envvar="PRONK_API_KEY", help="The server's key", show_default=False)
    ] = "",
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="Requests at a time; default: what fills the engine")
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Run lines that have failed once more")
    ] = False,
) -> None:
    """Answer a file of requests in OpenAI's batch format; a second run goes on where one stopped.

    INPUT comes first. Takes the engine's settings as pronk serve does (--dtype, --max-num-seqs...).
    Exit code: 0 all are answered, 1 it could not run, 3 some lines failed, 130 interrupted.
    """
    from service.batch.problem import BatchProblem
    from service.settings import SettingsProblem, read_settings

    if url is not None and (model is not None or context.args):
        fail("give a model with its settings or --url, not both", code=2)
    try:
        settings = read_settings([*([model] if model is not None else []), *context.args])
    except SettingsProblem as problem:
        fail(f"{problem}\nINPUT comes first; the engine's settings: pronk serve --help", code=2)
    from service.batch.run import BatchSettings, run_batch

    target = output or requests.with_suffix(".output.jsonl")
    try:
        done = run_batch(
            BatchSettings(requests, target, settings, url, api_key, concurrency, retry_failed)
        )
    except BatchProblem as problem:
        fail(str(problem))
    print(f"{target}: {done.text()}", file=sys.stderr)
    raise typer.Exit(done.code)


@app.command()
def chat(
    model: Annotated[
        str | None, typer.Argument(help="A model to serve for this chat; default: the bundled one")
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(help="Talk to a running server instead, e.g. http://127.0.0.1:8000"),
    ] = None,
    api_key: Annotated[
        str, typer.Option(envvar="PRONK_API_KEY", help="The server's key", show_default=False)
    ] = "",
    system: Annotated[str | None, typer.Option(help="A system message to begin with")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, max=2)] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1)] = None,
) -> None:
    """Talk to a model in the terminal (starts a private server unless --url is given)."""
    from service.chat import ChatProblem, ChatSettings, converse

    try:
        converse(ChatSettings(model, url, api_key, system, temperature, max_tokens))
    except ChatProblem as problem:
        fail(str(problem))


class Scheme(StrEnum):
    """What ``quantize`` writes."""

    INT8 = "int8"
    INT4 = "int4"


class AnyScheme(StrEnum):
    """What a model can be loaded as."""

    AUTO = "auto"
    NONE = "none"
    INT8 = "int8"
    INT4 = "int4"
    FP8 = "fp8"


Texts = Annotated[
    list[Path] | None,
    typer.Option(
        help="A UTF-8 file to score, repeatable; default: held-out passages that ship with pronk",
        exists=True,
        dir_okay=False,
    ),
]
DeviceName = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads; default: the cores")]


@app.command()
def quantize(
    source: Annotated[str, typer.Argument(metavar="IN", help="A Hugging Face folder or a hub id")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write")],
    quantization: Annotated[Scheme, typer.Option(help="Bits of a weight")] = Scheme.INT8,
    force: Annotated[bool, typer.Option(help="Replace a checkpoint that is there")] = False,
    evaluate: Annotated[
        bool, typer.Option("--eval/--no-eval", help="Measure perplexity before and after")
    ] = True,
    text: Texts = None,
    device: DeviceName = "auto",
    dtype: Dtype = "auto",
    threads: Threads = None,
) -> None:
    """Write a quantized copy of a checkpoint, once (compressed-tensors, pack-quantized)."""
    from service.evaluate import Device, EvaluationProblem
    from service.evaluate import quantize as write

    where = Device(device, check_dtype(dtype), threads)
    texts = (text or []) if evaluate else None
    try:
        write(source, target, quantization.value, force=force, texts=texts, device=where)
    except EvaluationProblem as problem:
        fail(str(problem))


@app.command("eval")
def evaluate(
    model: Annotated[
        str | None, typer.Argument(help="A folder, a .gguf file or a hub id; default: the bundled")
    ] = None,
    text: Texts = None,
    quantization: Annotated[
        AnyScheme, typer.Option(help="Measure the model under this scheme as well")
    ] = AnyScheme.AUTO,
    device: DeviceName = "auto",
    dtype: Dtype = "auto",
    threads: Threads = None,
) -> None:
    """Print a model's perplexity, and what quantization makes of it."""
    from service.evaluate import Device, EvaluationProblem
    from service.evaluate import evaluate as measure

    where = Device(device, check_dtype(dtype), threads)
    try:
        measure(model, text or [], quantization.value, where)
    except EvaluationProblem as problem:
        fail(str(problem))


def check_dtype(dtype: str) -> str:
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        fail(f"--dtype is auto, float32, bfloat16 or float16, not {dtype}", code=2)
    return dtype


class By(StrEnum):
    """What a row of ``usage`` stands for."""

    KEY = "key"
    MODEL = "model"
    DAY = "day"
    HOUR = "hour"
    REQUEST = "request"


@app.command()
def usage(
    ledger: Annotated[
        str | None,
        typer.Option(envvar="PRONK_LEDGER", help="The file; default: the one pronk serve writes"),
    ] = None,
    since: Annotated[
        str | None, typer.Option(help="A date or time (UTC), or so long ago: 30m, 24h, 7d")
    ] = None,
    until: Annotated[str | None, typer.Option(help="Before this date or time; as --since")] = None,
    key: Annotated[str | None, typer.Option(help="Of the key of this name or id alone")] = None,
    by: Annotated[By, typer.Option(help="What a row stands for")] = By.KEY,
    csv: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write CSV to a file; - is standard output")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON")] = False,
) -> None:
    """Report tokens, requests and seconds from the usage ledger of pronk serve."""
    from service.ledger.cli import UsageProblem, UsageSettings, report_usage

    try:
        report_usage(UsageSettings(ledger, since, until, key, by.value, csv, json))
    except UsageProblem as problem:
        fail(str(problem))


@app.command()
def top(
    urls: Annotated[
        list[str] | None,
        typer.Argument(metavar="[URL]...", help="Servers; default: http://127.0.0.1:8000"),
    ] = None,
    api_key: Annotated[
        str, typer.Option(envvar="PRONK_API_KEY", help="An admin key", show_default=False)
    ] = "",
    interval: Annotated[float, typer.Option(min=0.2, help="Seconds between two looks")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Look for one interval, print, end")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, a line a look")] = False,
) -> None:
    """Watch running servers: load, KV cache, tokens a second, latencies, keys. Ctrl-C ends."""
    from service.top.scrape import TopProblem
    from service.top.watch import TopSettings, watch

    try:
        watch(TopSettings(urls or ["http://127.0.0.1:8000"], api_key, interval, once, json))
    except TopProblem as problem:
        fail(str(problem))
    except KeyboardInterrupt:
        raise typer.Exit from None


@app.command()
def doctor() -> None:
    """Report device, torch, memory and instruction sets, and what to change."""
    from service.doctor import report

    raise typer.Exit(report())


@app.command()
def version() -> None:
    """Print the version."""
    print(f"pronk {__version__}")


def fail(message: str, code: int = 1) -> None:
    """One clear line on standard error and a non-zero exit, never a traceback."""
    print(f"pronk: {message}", file=sys.stderr)
    raise typer.Exit(code)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
