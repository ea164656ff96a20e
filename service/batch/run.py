"""A batch from its settings to its summary: as many lines at once as fill the engine."""

from __future__ import annotations

import asyncio
import functools
import logging
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import msgspec
import uvloop
from msgspec import Raw, Struct
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from service.batch.endpoint import Endpoint, own_engine, running_server
from service.batch.output import Failure, Output, Response, open_output, record
from service.batch.problem import BatchProblem
from service.batch.requests import BatchRequest, Refused, count_lines, read_requests
from service.logs import configure_logging
from service.settings import Settings

logger = logging.getLogger("pronk.batch")

REFUSED_FOR_NOW = (429, 503, 529)  # the request was not taken: sent again whatever it takes
FAILED = (500, 502, 504)
UNAUTHORIZED = 401
TRIES = 3  # of a request the engine took and failed on
PATIENCE = 600.0  # seconds one request may be refused before the run ends
LONGEST_PAUSE = 30.0
SAY_EVERY = 10.0  # seconds between two lines of progress where no terminal shows a bar
LINES_FAILED = 3  # exit code: the run is whole, some lines have no answer
INTERRUPTED = 130


@dataclass(frozen=True)
class BatchSettings:
    """``engine``: what ``pronk serve`` would be started with; ``url``: a server in its place."""

    input: Path
    output: Path
    engine: Settings
    url: str | None = None
    api_key: str = field(default="", repr=False)
    concurrency: int | None = None
    retry_failed: bool = False


@dataclass
class Summary:
    """What this run did; ``num_before`` lines were done by earlier ones."""

    num_before: int = 0
    num_answered: int = 0
    num_refused: int = 0  # a status, or a line that is none
    num_failed_before: int = 0  # of those done by earlier runs
    prompt_tokens: int = 0
    completion_tokens: int = 0
    was_interrupted: bool = False
    started: float = field(default_factory=time.monotonic)

    @property
    def num_done(self) -> int:
        return self.num_answered + self.num_refused

    @property
    def code(self) -> int:
        if self.was_interrupted:
            return INTERRUPTED
        return LINES_FAILED if self.num_refused or self.num_failed_before else 0

    def text(self) -> str:
        seconds = time.monotonic() - self.started
        parts = [f"{self.num_answered} answered, {self.num_refused} failed"]
        if self.num_before:
            parts.append(f"{self.num_before} done before")
        if self.num_failed_before:
            parts.append(f"{self.num_failed_before} of them failed: see --retry-failed")
        rate = self.completion_tokens / seconds if seconds else 0.0
        parts.append(f"{self.prompt_tokens} prompt tokens, {self.completion_tokens} generated")
        parts.append(f"{seconds:.1f} s, {rate:.0f} tokens/s")
        return "; ".join(parts)


def run_batch(settings: BatchSettings) -> Summary:
    """Raises ``BatchProblem`` with one clear line."""
    configure_logging(settings.engine.log_level, settings.engine.log_format)
    if settings.output.exists() and settings.output.samefile(settings.input):
        raise BatchProblem("the output is the input: give another one")
    total = count_lines(settings.input)
    with (
        open_output(settings.output, again=settings.retry_failed) as output,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        return runner.run(_run(settings, output, total))


async def _run(settings: BatchSettings, output: Output, total: int) -> Summary:
    """A signal ends it as the end of the input does, only earlier."""
    summary = Summary(output.num_before, num_failed_before=output.num_failed_before)
    work = asyncio.create_task(_answer_all(settings, output, total, summary))
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, work.cancel)
    try:
        await work
    except asyncio.CancelledError:
        summary.was_interrupted = True
    return summary


async def _answer_all(
    settings: BatchSettings, output: Output, total: int, summary: Summary
) -> None:
    async with _endpoint(settings) as endpoint:
        summary.started = time.monotonic()  # loading is no part of the rate
        lines = _left(settings, endpoint, output)
        with _progress(total, summary):
            workers = settings.concurrency or endpoint.concurrency
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(workers):
                        group.create_task(_work(lines, endpoint, output, summary))
            except ExceptionGroup as group_error:
                raise group_error.exceptions[0] from None


def _endpoint(settings: BatchSettings) -> AbstractAsyncContextManager[Endpoint]:
    if settings.url is None:
        return own_engine(settings.engine)
    return running_server(settings.url, settings.api_key, settings.engine.max_body_bytes)


def _left(
    settings: BatchSettings, endpoint: Endpoint, output: Output
) -> Iterator[BatchRequest | Refused]:
    """What no earlier run has done; shared by all workers, each takes the next."""
    for line in read_requests(settings.input, endpoint.max_body_bytes):
        if not output.has(line):
            yield line


async def _work(
    lines: Iterator[BatchRequest | Refused], endpoint: Endpoint, output: Output, summary: Summary
) -> None:
    for line in lines:
        response: Response | None = None
        if isinstance(line, Refused):
            error: Failure | None = Failure(line.code, line.message, line.param, line.number)
        else:
            response, error = await _ask(endpoint.client, line)
        entry = record(line, response, error)
        output.append(entry)
        if entry.is_answered and response is not None:
            summary.num_answered += 1
            _count_tokens(response, summary)
        else:
            summary.num_refused += 1
        await asyncio.sleep(0)  # a thousand bad lines in a row hold nobody up


async def _ask(
    client: httpx.AsyncClient, line: BatchRequest
) -> tuple[Response | None, Failure | None]:
    """Until it is taken and answered; what fails in the engine is tried a few times."""
    since, tries = time.monotonic(), 0
    while True:
        try:
            answer = await client.post(
                line.url, content=line.body, headers={"Content-Type": "application/json"}
            )
        except httpx.TransportError as error:
            reason, pause = f"no server answers ({type(error).__name__})", 1.0
            _warn_once(f"{reason}; trying again for {PATIENCE:g} s")
        else:
            tries += answer.status_code in FAILED
            if answer.status_code == UNAUTHORIZED:
                raise BatchProblem("the server does not take the key: see --api-key")
            if answer.status_code in REFUSED_FOR_NOW and not _is_final(answer):
                reason, pause = _refusal(answer)
            elif answer.status_code in FAILED and tries < TRIES:
                reason, pause = f"the server answers {answer.status_code}", float(tries)
            else:
                return _response(answer, line)
        if time.monotonic() - since > PATIENCE:
            raise BatchProblem(f"{reason}; run it again to go on")
        await asyncio.sleep(min(pause, LONGEST_PAUSE))


@functools.cache
def _warn_once(message: str) -> None:
    """Every line that waits would say the same."""
    logger.warning(message)


def _is_final(answer: httpx.Response) -> bool:
    """The key's limits never let this request in, however long it waits."""
    never = answer.headers.get("x-should-retry") == "false"
    return never and "retry-after" not in answer.headers


def _refusal(answer: httpx.Response) -> tuple[str, float]:
    """(why, seconds to wait). Raises ``BatchProblem`` where waiting would not help."""
    try:
        error = answer.json()["error"]
        message, code = error["message"], error.get("code")  # Anthropic's envelope has none
    except (ValueError, KeyError, TypeError, AttributeError):
        message, code = f"the server answers {answer.status_code}", None
    if code == "engine_failed":
        raise BatchProblem(f"{message} Run it again to go on.")
    try:
        pause = max(0.05, float(answer.headers.get("retry-after", "1")))
    except ValueError:  # a date
        pause = 1.0
    if pause > PATIENCE:  # a quota is spent
        raise BatchProblem(f"{message} Run it again to go on.")
    return str(message), pause


def _response(answer: httpx.Response, line: BatchRequest) -> tuple[Response | None, Failure | None]:
    """The body as it came, on one line."""
    try:
        body = msgspec.json.encode(msgspec.json.decode(answer.content))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        message = f"The server answered {answer.status_code} with a body that is not JSON."
        return None, Failure("invalid_answer", message, None, line.number)
    return Response(answer.status_code, answer.headers.get("x-request-id", ""), Raw(body)), None


class _Usage(Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    input_tokens: int = 0  # as responses and messages have it
    output_tokens: int = 0


class _Counted(Struct):
    usage: _Usage | None = None


_counted = msgspec.json.Decoder(_Counted)


def _count_tokens(response: Response, summary: Summary) -> None:
    try:
        usage = _counted.decode(response.body).usage
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return  # another server's own shape
    if usage is not None:
        summary.prompt_tokens += usage.prompt_tokens + usage.input_tokens
        summary.completion_tokens += usage.completion_tokens + usage.output_tokens


@contextmanager
def _progress(total: int, summary: Summary) -> Iterator[None]:
    """A bar in a terminal, a line now and then elsewhere, until the block is left."""
    bar = _bar() if sys.stderr.isatty() else None
    ticker = asyncio.create_task(_tick(bar, total, summary))
    try:
        yield
    finally:
        ticker.cancel()
        if bar is not None:
            bar.stop()


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )


async def _tick(bar: Progress | None, total: int, summary: Summary) -> None:
    if bar is None:
        while True:
            await asyncio.sleep(SAY_EVERY)
            logger.info("%d of %d lines", summary.num_before + summary.num_done, total)
    bar.start()
    task = bar.add_task("batch", total=total)
    while True:
        seconds = time.monotonic() - summary.started
        rate = f"{summary.completion_tokens / max(seconds, 0.1):.0f} tokens/s"
        bar.update(task, description=rate, completed=summary.num_before + summary.num_done)
        await asyncio.sleep(0.2)
