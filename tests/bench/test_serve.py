"""``pronk bench serve`` from its command line to its files, against pronk and against worse."""

from __future__ import annotations

import asyncio
import builtins
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner, Result

from service.api.app import create_app
from service.bench import plot
from service.bench.report import ServeReport, command_line, table
from service.cli import app
from service.errors import Overloaded
from service.registry import ModelRegistry
from service.settings import Settings
from tests.api.fakes import FakeEngine, served
from tests.api.live import listening
from tests.bench.scripted_server import Call, Talk, answer, answering, text

SHORT = ("--input-len", "8", "--output-len", "4", "--vocabulary", "200", "--num-requests", "6")


def bench(*words: str) -> Result:
    return CliRunner().invoke(app, ["bench", "serve", *words])


def endless(prompt: list[int], settings: object) -> list[int]:
    """As real networks are under ignore_eos: it goes on to the budget."""
    return [97] * 50


@contextmanager
def pronk(engine: FakeEngine | None = None, **settings: Any) -> Iterator[str]:
    registry = ModelRegistry([served(engine or FakeEngine(script=endless))])
    with listening(create_app(Settings(**settings), registry)) as url:
        yield url


@contextmanager
def scripted(talk: Talk) -> Iterator[str]:
    """A scripted server in a thread: the command has an event loop of its own."""
    ready, urls = threading.Event(), []
    stop: list[Callable[[], object]] = []

    async def serve() -> None:
        done, loop = asyncio.Event(), asyncio.get_running_loop()
        stop.append(lambda: loop.call_soon_threadsafe(done.set))
        async with answering(talk) as server:
            urls.append(server.url)
            ready.set()
            await done.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    assert ready.wait(5)
    try:
        yield urls[0]
    finally:
        stop[0]()
        thread.join(5)


def test_a_run_against_pronk_is_measured_written_and_drawn(tmp_path: Path) -> None:
    written, picture = tmp_path / "result.json", tmp_path / "result.svg"
    with pronk() as url:
        result = bench(
            url, *SHORT, "--concurrency", "1,3", "--request-rate", "50",
            "--json", str(written), "--plot", str(picture),
        )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert re.search(r"^3 streams +[\d.]+", result.stdout, re.MULTILINE)
    assert re.search(r"^50 req/s +[\d.]+", result.stdout, re.MULTILINE)
    report = msgspec.json.decode(written.read_bytes(), type=ServeReport)
    assert [(level.kind, level.level) for level in report.levels] == [
        ("concurrency", 1),
        ("concurrency", 3),
        ("rate", 50),
    ]
    for level in report.levels:
        assert (level.num_requests, level.num_good, level.output_tokens) == (6, 6, 24)
        assert level.prompt_tokens == 48
        assert level.output_tokens_per_second == pytest.approx(24 / level.seconds)
        assert None not in msgspec.structs.astuple(level.ttft)
    assert report.server.url == url
    assert report.server.model == "pronk-test" or report.server.model
    assert report.server.version, "pronk tells its version"
    assert report.settings["seed"] == 0
    assert b"</svg>" in picture.read_bytes()


def test_the_json_has_every_field_and_no_other(tmp_path: Path) -> None:
    written = tmp_path / "result.json"
    with pronk() as url:
        assert bench(url, *SHORT, "--concurrency", "2", "--json", str(written)).exit_code == 0
    found = json.loads(written.read_text())
    assert set(found) == {field.name for field in msgspec.structs.fields(ServeReport)}
    assert set(found["levels"][0]["itl"]) == {"mean", "p50", "p90", "p99", "longest"}
    assert found["format"] == 1


def test_a_chat_and_text_prompts_are_fitted_to_the_server_s_tokenizer(tmp_path: Path) -> None:
    """The fake tokenizer takes a token a byte: far fewer words than tokens are wanted."""
    written = tmp_path / "result.json"
    with pronk(FakeEngine(script=endless)) as url:
        words = ("--input-len", "100", "--output-len", "4", "--num-requests", "8")
        result = bench(
            url, *words, "--concurrency", "2", "--endpoint", "chat", "--json", str(written)
        )
    assert result.exit_code == 0, result.output
    level = json.loads(written.read_text())["levels"][0]
    assert level["num_good"] == 8
    assert 80 < level["prompt_tokens"] / 8 < 150


def test_words_are_fitted_by_whole_answers_where_streams_tell_no_usage() -> None:
    prompts: list[str] = []

    async def talk(call: Call) -> None:
        if call.body["stream"]:
            prompts.append(call.body["prompt"])
            await call.begin()
            await call.event(text("a", "length"))
            await call.end()
        else:
            await answer(call)

    words = ("--input-len", "120", "--output-len", "1", "--num-requests", "2")
    with scripted(talk) as url:
        result = bench(url, *words, "--concurrency", "1", "--prompt-format", "text")
    assert result.exit_code == 0, result.output
    assert {len(prompt.split()) for prompt in prompts} == {40}, "three tokens a word"


def test_refusals_are_counted_apart_and_are_no_failures(tmp_path: Path) -> None:
    refused = {number: Overloaded("full", retry_after=1.0) for number in (3, 5)}
    engine = FakeEngine(script=endless, refusals=refused)
    with pronk(engine) as url:
        result = bench(
            url, *SHORT, "--concurrency", "1", "--warmup", "2", "--json", str(tmp_path / "r")
        )
    assert result.exit_code == 0, result.output
    level = json.loads((tmp_path / "r").read_text())["levels"][0]
    assert (level["num_good"], level["num_refused"], level["failures"]) == (4, 2, {})
    assert "2 refused: full" in result.stderr


def test_a_server_that_refuses_everything_is_an_error() -> None:
    calls = 0

    async def talk(call: Call) -> None:
        nonlocal calls
        calls += 1
        if calls <= 2:
            await answer(call)
        else:
            await call.whole("500 Internal Server Error", {"error": "gone"})

    with scripted(talk) as url:
        result = bench(url, *SHORT, "--concurrency", "2")
    assert result.exit_code == 1
    assert "6 http 500: gone" in result.stderr
    assert "not one request succeeded" in result.stderr


def test_a_server_that_hangs_is_given_up() -> None:
    async def talk(call: Call) -> None:
        await asyncio.sleep(5)

    with scripted(talk) as url:
        result = bench(url, *SHORT, "--concurrency", "2", "--timeout", "0.2")
    assert result.exit_code == 1
    assert "timeout" in result.stderr


def test_the_key_is_sent_and_never_written(tmp_path: Path) -> None:
    with pronk(api_key=["secret"]) as url:
        assert "refuses the key" in bench(url, *SHORT, "--api-key", "wrong").stderr
        words = ("--api-key", "secret", "--json", str(tmp_path / "r"))
        assert bench(url, *SHORT, "--concurrency", "1", *words).exit_code == 0
    assert "secret" not in (tmp_path / "r").read_text()
    assert command_line(["--api-key", "secret", "--api-key=secret"]).count("secret") == 0


def test_nobody_there_is_one_line() -> None:
    result = bench("http://127.0.0.1:1", *SHORT)
    assert result.exit_code == 1
    assert result.stderr.startswith("pronk: no server answers at http://127.0.0.1:1")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--concurrency", "x"), "no list of numbers"),
        (("--concurrency", "0"), "is no load"),
        (("--concurrency", "1.5"), "is no load"),
        (("--request-rate", "-1"), "is no load"),
        (("--input-len", "9:3"), "no length"),
        (("--endpoint", "embeddings"), "completions or chat"),
        (("--endpoint", "chat", "--prompt-format", "ids"), "needs text prompts"),
        (("--extra-body", "["), "is no JSON"),
        (("--extra-body", "[1]"), "is a JSON object"),
        (("--plot", "x.pdf"), ".png or .svg"),
        (("--plot", "/nowhere/x.png"), "no folder"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is_sent(
    words: tuple[str, ...], says: str
) -> None:
    result = bench("http://127.0.0.1:1", *words)
    assert result.exit_code == 1
    assert says in result.stderr
    assert "no server answers" not in result.stderr


def test_a_missing_matplotlib_is_said_before_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    importing: Callable[..., Any] = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return importing(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    result = bench("http://127.0.0.1:1", "--plot", str(tmp_path / "x.png"))
    assert "pip install '.[bench]'" in result.stderr


@pytest.mark.parametrize("name", ["x.png", "x.svg"])
def test_a_plot_of_levels_that_partly_failed(tmp_path: Path, name: str) -> None:
    from service.bench.client import Trace
    from service.bench.load import Level
    from service.bench.summary import summarize

    good, bad = Trace(0.0, [0.1, 0.2], 0.3, 2), Trace(0.0, end=1.0)
    bad.fail("timeout")
    levels = [
        summarize(Level("concurrency", 1), [good], 1.0),
        summarize(Level("rate", 2.5), [good, bad], 1.0),
        summarize(Level("rate", 9), [bad], 1.0),
    ]
    plot.draw(levels, "title", tmp_path / name)
    start = (tmp_path / name).read_bytes()[:200]
    assert start.startswith(b"\x89PNG") or b"<?xml" in start


def test_a_table_s_columns_have_one_width() -> None:
    assert table([("", "a", "bb"), ("long", "1.5", "2")]) == "        a  bb\nlong  1.5   2"


def test_help_names_both_commands_and_their_flags() -> None:
    runner = CliRunner()
    both = runner.invoke(app, ["bench", "--help"]).output
    assert "engine" in both
    assert "serve" in both
    flags = runner.invoke(app, ["bench", "serve", "--help"]).output
    for flag in ("--concurrency", "--request-rate", "--shared-prefix", "--prompt-format", "--plot"):
        assert flag in flags
