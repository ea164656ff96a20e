"""``pronk bench serve URL``: load on any OpenAI-compatible server, from flags to a report."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from service.bench import plot, report
from service.bench.client import Broken, Target, Trace, fetch, stream
from service.bench.events import message_of, read_event
from service.bench.load import Asking, Level, run
from service.bench.problem import BenchProblem
from service.bench.report import Server, ServeReport
from service.bench.summary import Summary, summarize
from service.bench.workload import Job, Lengths, Workload

WARM_UP_STREAM = 1 << 30  # no level draws its prompts from it
UNANSWERED = (OSError, EOFError, Broken)
SECONDS_AT_RATE = 30.0  # a rate is held so long where no number of requests is given
SAMPLE_WORDS = (8, 256)  # at least and at most, to learn how many make a token


@dataclass(frozen=True)
class ServeSettings:
    """``model`` None asks the server, "" sends no name. ``num_requests`` None fits each level."""

    target: Target
    levels: list[Level]
    workload: Workload
    endpoint: str = "completions"
    model: str | None = None
    num_requests: int | None = None
    warmup: int = 2
    ignore_eos: bool = True
    extra: dict[str, Any] = field(default_factory=dict)
    json: Path | None = None
    plot: Path | None = None

    def __post_init__(self) -> None:
        if not self.levels:
            raise BenchProblem("give --concurrency or --request-rate")
        for level in self.levels:
            if level.value <= 0 or (level.kind == "concurrency" and level.value % 1):
                raise BenchProblem(f"{level} is no load")
        if self.endpoint == "chat" and self.workload.prompt_format == "ids":
            raise BenchProblem("a chat takes no token ids: --endpoint chat needs text prompts")

    def requests_of(self, level: Level) -> int:
        if self.num_requests is not None:
            return self.num_requests
        if level.kind == "concurrency":
            return max(4, 3 * int(level.value))
        return max(8, round(SECONDS_AT_RATE * level.value))


def measure(settings: ServeSettings) -> ServeReport:
    """Run every level and write what was asked for. Raises ``BenchProblem``."""
    if settings.plot is not None:
        plot.check(settings.plot)
    console = Console(stderr=True, highlight=False)
    server, levels = asyncio.run(_measure(settings, console))
    found = ServeReport(
        command=report.command_line(),
        date=report.now(),
        machine=report.machine(),
        server=server,
        settings=shown_settings(settings),
        levels=levels,
    )
    if settings.json is not None:
        report.write_json(found, settings.json)
    if settings.plot is not None:
        plot.draw(levels, title_of(found), settings.plot)
    return found


async def _measure(settings: ServeSettings, console: Console) -> tuple[Server, list[Summary]]:
    server = await ask_server(settings.target)
    model = server.model if settings.model is None else settings.model
    asking = Asking(settings.endpoint, model, settings.ignore_eos, extra=settings.extra)
    workload = await fit_words(settings.target, asking, settings.workload)
    await warm_up(settings, asking, workload)
    levels: list[Summary] = []
    for number, level in enumerate(settings.levels):
        jobs = workload.jobs(settings.requests_of(level), stream=number)
        with progress(console, str(level), len(jobs)) as observe:
            seed = workload.seed + number
            traces, seconds = await run(settings.target, asking, level, jobs, seed, observe)
        levels.append(summarize(level, traces, seconds))
    return server, levels


async def ask_server(target: Target) -> Server:
    """Raises ``BenchProblem`` where nobody answers, or the key is not good."""
    try:
        status, headers, body = await fetch(target, "/v1/models")
    except UNANSWERED as error:
        raise BenchProblem(f"no server answers at {target.root}: {error}") from None
    if status in (401, 403):
        raise BenchProblem(f"the server refuses the key: {message_of(body)} (--api-key)")
    return Server(
        url=target.root,
        model=_first_model(body) if status == 200 else "",
        software=headers.get("server", ""),
        version=await _version(target),
    )


def _first_model(body: bytes) -> str:
    try:
        return str(msgspec.json.decode(body)["data"][0]["id"])
    except (ValueError, KeyError, IndexError, TypeError):
        return ""


async def _version(target: Target) -> str:
    """pronk and vLLM have /version, llama.cpp says it among its properties."""
    for path, key in (("/version", "version"), ("/props", "build_info")):
        try:
            status, _, body = await fetch(target, path)
            found = msgspec.json.decode(body) if status == 200 else {}
        except (*UNANSWERED, ValueError):
            continue
        if isinstance(found, dict) and found.get(key):
            return str(found[key])
    return ""


async def fit_words(
    target: Target, asking: Asking, workload: Workload, sample: int | None = None
) -> Workload:
    """With text prompts, as many words a token as this server's tokenizer makes of them.

    A chat's template adds tokens of its own, so two lengths are asked for and their difference
    counts, the longer one of ``sample`` words. Whole answers, because some servers tell a stream
    no usage; where there is none it stays at a word a token.
    """
    if workload.prompt_format != "text":
        return workload
    least, most = SAMPLE_WORDS
    sample = sample or max(3 * least, min(most, workload.input_len.high // 4))
    counts = []
    for words in (least, sample):
        text = replace(workload, input_len=Lengths(words, words), shared_prefix=0)
        job = replace(text, words_per_token=1.0).jobs(1, WARM_UP_STREAM)[0]
        counts.append(await _prompt_tokens(target, asking, replace(job, output_len=1)))
    gained = counts[1] - counts[0]
    return replace(workload, words_per_token=(sample - least) / gained) if gained else workload


async def _prompt_tokens(target: Target, asking: Asking, job: Job) -> int:
    body = {**asking.body(job), "stream": False}
    body.pop("stream_options", None)
    try:
        status, _, answer = await fetch(target, asking.path, body)
        found = read_event(answer) if status == 200 else None
    except (*UNANSWERED, ValueError) as error:
        raise BenchProblem(f"the first request failed: {error or type(error).__name__}") from None
    if found is None:
        raise BenchProblem(f"the first request failed: http {status}, {message_of(answer)}")
    return found.usage.prompt_tokens if found.usage else 0


async def warm_up(settings: ServeSettings, asking: Asking, workload: Workload) -> None:
    """Requests nobody counts, one after another; the first to fail ends the benchmark."""
    for job in workload.jobs(settings.warmup, WARM_UP_STREAM):
        _fail_early(await stream(settings.target, asking.path, asking.body(job)))


def _fail_early(trace: Trace) -> None:
    if trace.failure:
        is_odd = trace.failure in ("http 422", "http 500") or "string" in trace.detail
        hint = " (try --prompt-format text, --no-ignore-eos)" if is_odd else ""
        raise BenchProblem(f"the first request failed: {trace.failure}, {trace.detail}{hint}")


@contextmanager
def progress(console: Console, title: str, total: int) -> Iterator[Callable[[Trace], None]]:
    """A bar in a terminal, with the tokens so far; nothing elsewhere."""
    if not (console.is_terminal and sys.stderr.isatty()):
        yield lambda trace: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    tail = (TimeElapsedColumn(), TextColumn("{task.fields[tokens]} tokens"))
    with Progress(*columns, *tail, console=console, transient=True, refresh_per_second=4) as bar:
        task = bar.add_task(title, total=total, tokens=0)
        tokens = 0

        def observe(trace: Trace) -> None:
            nonlocal tokens
            tokens += trace.tokens
            bar.update(task, advance=1, tokens=tokens)

        yield observe


def shown_settings(settings: ServeSettings) -> dict[str, Any]:
    """All that decides what was sent, so that it can be sent again."""
    workload = settings.workload
    return {
        "endpoint": settings.endpoint,
        "input_len": str(workload.input_len),
        "output_len": str(workload.output_len),
        "shared_prefix": workload.shared_prefix,
        "prompt_format": workload.prompt_format,
        "vocabulary": workload.vocabulary,
        "seed": workload.seed,
        "warmup": settings.warmup,
        "ignore_eos": settings.ignore_eos,
        "extra": settings.extra,
    }


def title_of(found: ServeReport) -> str:
    what = f"{found.settings['input_len']} in, {found.settings['output_len']} out"
    prefix = found.settings["shared_prefix"]
    return f"{found.server.model or found.server.url}: {what}" + (
        f", {prefix} shared" if prefix else ""
    )


def problems(levels: list[Summary]) -> list[str]:
    """One line for each kind of failure of each level."""
    return [
        f"{level.level:g}: {count} {kind}: {level.examples.get(kind, '')}"
        for level in levels
        for kind, count in [*level.failures.items(), ("refused", level.num_refused)]
        if count
    ]
