"""The flags of ``pronk bench`` (the engine alone) and ``pronk bench serve`` (a server)."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from service.bench.client import Target
from service.bench.load import Level
from service.bench.problem import BenchProblem
from service.bench.workload import Lengths, Workload

DEFAULT = "engine"
ENDPOINTS, FORMATS = ("completions", "chat"), ("ids", "text")


class BenchGroup(TyperGroup):
    """``pronk bench MODEL`` is ``pronk bench engine MODEL``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or (args[0] not in self.commands and args[0] != "--help"):
            args = [DEFAULT, *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=BenchGroup,
    help="Measure the engine alone (pronk bench [MODEL]), or a server (pronk bench serve URL).",
    rich_markup_mode=None,
    add_completion=False,
)

JSON = Annotated[Path | None, typer.Option("--json", help="Write the result as JSON")]
Seed = Annotated[int, typer.Option(help="Prompts, lengths and arrivals are drawn from it")]
InputLen = Annotated[str, typer.Option(help="Prompt tokens: 128, or a range 64:512")]
OutputLen = Annotated[str, typer.Option(help="Tokens to generate: 128, or a range 64:512")]
SharedPrefix = Annotated[
    int, typer.Option(min=0, help="Tokens that begin every prompt, within its length")
]


@app.command(
    DEFAULT,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
)
def engine(
    context: typer.Context,
    shape: Annotated[
        str | None, typer.Option(help="Random weights instead of a model: 135m, 1b, 8b, tiny")
    ] = None,
    concurrency: Annotated[
        str, typer.Option(help="Sequences at a time, one or several: 1,8,32")
    ] = "1,8,32",
    input_len: InputLen = "128",
    output_len: OutputLen = "128",
    shared_prefix: SharedPrefix = 0,
    num_prompts: Annotated[
        int | None, typer.Option(min=1, help="Default: as many as run at a time")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0 is greedy")] = 0.0,
    seed: Seed = 0,
    json_file: JSON = None,
) -> None:
    """The engine's own scheduler and runner in this process: pronk bench [MODEL].

    Takes the engine's settings as pronk serve does (--dtype, --device, --threads...).
    """
    from service.bench import offline
    from service.settings import SettingsProblem, read_settings

    try:
        settings = read_settings(context.args)
    except SettingsProblem as problem:
        fail(f"{problem}\nThe engine's settings: pronk serve --help", code=2)
    try:
        workload = Workload(
            Lengths.parse(input_len), Lengths.parse(output_len), shared_prefix, seed=seed
        )
        wanted = offline.OfflineSettings(
            settings,
            [int(count) for count in numbers(concurrency)],
            workload,
            shape,
            num_prompts,
            temperature,
            json_file,
        )
        print(offline.show(offline.measure(wanted)))
    except BenchProblem as problem:
        fail(str(problem))


@app.command()
def serve(
    url: Annotated[str, typer.Argument(help="The server's address: http://127.0.0.1:8000")],
    concurrency: Annotated[
        str, typer.Option(help="Requests in flight all the time, one or several levels: 1,8,32")
    ] = "",
    request_rate: Annotated[
        str, typer.Option(help="Poisson arrivals a second, one or several rates: 0.5,2")
    ] = "",
    input_len: InputLen = "128",
    output_len: OutputLen = "128",
    shared_prefix: SharedPrefix = 0,
    num_requests: Annotated[
        int | None,
        typer.Option(min=1, help="Of each level; default: three times the concurrency, or 30 s"),
    ] = None,
    warmup: Annotated[int, typer.Option(min=0, help="Requests before, that do not count")] = 2,
    endpoint: Annotated[str, typer.Option(help="completions or chat")] = "completions",
    prompt_format: Annotated[
        str, typer.Option(help="ids (random tokens) or text (words); default: ids, chat: text")
    ] = "",
    vocabulary: Annotated[
        int, typer.Option(min=2, help="Random ids are drawn below it: at most the model's size")
    ] = 2000,
    model: Annotated[
        str | None, typer.Option(help="The model's name; default: the first of /v1/models")
    ] = None,
    api_key: Annotated[
        str, typer.Option(envvar="PRONK_API_KEY", help="The server's key", show_default=False)
    ] = "",
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for one answer")] = 600.0,
    ignore_eos: Annotated[
        bool, typer.Option(help="Ask for answers of full length (not every server knows how)")
    ] = True,
    extra_body: Annotated[
        str, typer.Option(help="JSON whose fields every request carries, too")
    ] = "{}",
    seed: Seed = 0,
    json_file: JSON = None,
    plot: Annotated[
        Path | None, typer.Option(help="Write latency over throughput: FILE.png or FILE.svg")
    ] = None,
) -> None:
    """Load on any OpenAI-compatible server: streamed, greedy, at fixed concurrency or by arrivals.

    Without --concurrency or --request-rate: 1, 8 and 32 requests at a time.
    """
    from service.bench import serve as serving
    from service.bench.report import serve_table

    try:
        settings = serving.ServeSettings(
            Target(url, api_key, timeout),
            levels_of(concurrency, request_rate),
            Workload(
                Lengths.parse(input_len),
                Lengths.parse(output_len),
                shared_prefix,
                one_of(prompt_format or ("text" if endpoint == "chat" else "ids"), FORMATS),
                vocabulary,
                seed=seed,
            ),
            one_of(endpoint, ENDPOINTS),
            model,
            num_requests,
            warmup,
            ignore_eos,
            fields_of(extra_body),
            json_file,
            plot,
        )
        found = serving.measure(settings)
    except BenchProblem as problem:
        fail(str(problem))
    except KeyboardInterrupt:
        fail("stopped before the end: nothing is written", code=130)
    print(serve_table(found.levels))
    for line in serving.problems(found.levels):
        print(line, file=sys.stderr)
    if not any(level.num_good for level in found.levels):
        fail("not one request succeeded")


def levels_of(concurrency: str, request_rate: str) -> list[Level]:
    if not concurrency and not request_rate:
        concurrency = "1,8,32"
    return [
        *(Level("concurrency", count) for count in numbers(concurrency)),
        *(Level("rate", rate) for rate in numbers(request_rate)),
    ]


def numbers(text: str) -> list[float]:
    """Numbers with commas or spaces between them."""
    try:
        return [float(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise BenchProblem(f"{text!r} is no list of numbers: 1,8,32") from None


def one_of(value: str, known: tuple[str, ...]) -> str:
    if value not in known:
        raise BenchProblem(f"{value!r} is not known: {' or '.join(known)}")
    return value


def fields_of(text: str) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise BenchProblem(f"--extra-body is no JSON: {error}") from None
    if not isinstance(fields, dict):
        raise BenchProblem("--extra-body is a JSON object")
    return fields


def fail(message: str, code: int = 1) -> Any:
    """One clear line on standard error and a non-zero exit, never a traceback."""
    print(f"pronk: {message}", file=sys.stderr)
    raise typer.Exit(code)
