"""Log lines: one a record, whatever a message holds."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator

import pytest

from service.log_bounds import BURST, KINDS, LONGEST, RepeatFilter
from service.logs import OWN, JsonFormatter, TextFormatter, configure_logging


def record(message: str, **extra: object) -> logging.LogRecord:
    made = logging.makeLogRecord({"msg": message, "levelname": "INFO", "name": "pronk.engine"})
    made.__dict__.update(extra)
    return made


def test_a_json_line_is_one_object_with_its_extras() -> None:
    line = JsonFormatter().format(record('a "quoted"\nline', request_id="r1"))
    assert "\n" not in line
    entry = json.loads(line)
    assert (entry["message"], entry["request_id"]) == ('a "quoted"\nline', "r1")


def test_control_characters_cannot_drive_the_terminal_or_forge_a_line() -> None:
    line = TextFormatter().format(record("colour \x1b[31m", request_id="x\n12:00:00 error forged"))
    assert "\x1b" not in line
    assert "\n" not in line


def test_a_trace_is_hidden_above_debug_level() -> None:
    try:
        raise ValueError("a prompt text")
    except ValueError as error:
        failed = record("step failed", exc_info=(ValueError, error, error.__traceback__))
    line = TextFormatter().format(failed)
    assert "ValueError" in line
    assert "a prompt text" not in line


def traced(error: BaseException, cause: BaseException, **allowed: bool) -> str:
    """The line of an exception with a cause, at debug level."""
    try:
        raise error from cause
    except BaseException as raised:
        failed = record("step failed", exc_info=(type(raised), raised, raised.__traceback__))
    return TextFormatter(has_traces=True, **allowed).format(failed)


def test_a_whole_trace_tells_places_and_types_but_not_the_words_of_exceptions() -> None:
    line = traced(ValueError("a prompt text"), KeyError("an answer"))
    assert "in traced" in line
    assert line.index("KeyError") < line.index("was the cause") < line.index("ValueError")
    assert "prompt" not in line
    assert "answer" not in line


def test_a_group_is_told_with_what_is_in_it_and_without_its_words() -> None:
    inner = RuntimeError("a prompt text")
    inner.add_note("another one")
    line = traced(ExceptionGroup("an answer", [inner]), ValueError())
    assert "RuntimeError" in line
    assert "a prompt text" not in line
    assert "an answer" not in line
    assert "another one" not in line


def test_what_the_system_says_is_told_without_the_path() -> None:
    line = traced(FileNotFoundError(2, "No such file or directory", "/a/prompt"), OSError())
    assert "FileNotFoundError: No such file or directory" in line
    assert "/a/prompt" not in line


def test_log_content_shows_the_words() -> None:
    line = traced(ValueError("a prompt text"), KeyError("an answer"), has_content=True)
    assert "ValueError: a prompt text" in line
    assert "an answer" in line


@pytest.fixture
def configured(capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[[str], None]]:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    levels = {name: logging.getLogger(name).level for name in OWN}
    yield lambda chosen: configure_logging(chosen, "text")
    root.handlers[:] = before
    root.setLevel(level)
    for name, own in levels.items():
        logging.getLogger(name).setLevel(own)


def test_other_libraries_say_nothing_at_debug_level(
    configured: Callable[[str], None], capfd: pytest.CaptureFixture[str]
) -> None:
    configured("debug")
    logging.getLogger("some.library").debug("got %s", "a prompt text")
    logging.getLogger("pronk.engine").debug("our own")
    told = capfd.readouterr().err
    assert "our own" in told
    assert "a prompt text" not in told


def test_a_line_that_cannot_be_made_is_told_without_its_arguments(
    configured: Callable[[str], None], capfd: pytest.CaptureFixture[str]
) -> None:
    configured("info")
    logging.getLogger("pronk.api").error("%d tokens", "a prompt text")
    told = capfd.readouterr().err
    assert "could not be logged" in told
    assert "a prompt text" not in told


@pytest.mark.parametrize("formatter", [TextFormatter(), JsonFormatter()])
def test_a_line_has_a_length_whatever_it_is_made_of(formatter: logging.Formatter) -> None:
    huge = "x" * 1_000_000
    line = formatter.format(record(huge, text=huge, values=[huge, huge], number=1))
    assert len(line) < 4 * LONGEST
    assert "characters left out" in line


def test_a_message_of_control_characters_cannot_start_a_line_of_its_own_in_json() -> None:
    line = JsonFormatter().format(record("a\r\n\x1b[2J\u2028\x00b", path="\r\n{}"))
    assert line.isascii()
    assert line.isprintable()


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.addFilter(RepeatFilter())
        self.lines: list[logging.LogRecord] = []

    def emit(self, one: logging.LogRecord) -> None:
        self.lines.append(one)


def warning(message: str, level: int = logging.WARNING) -> logging.LogRecord:
    return logging.makeLogRecord({"msg": message, "levelno": level, "name": "pronk.http"})


def test_repeated_warnings_are_thinned_out_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    handler = Lines()
    for _ in range(5_000):
        handler.handle(warning("Invalid HTTP request received."))
    assert len(handler.lines) == BURST
    handler.handle(warning("something else"))
    assert len(handler.lines) == BURST + 1
    now += 1.5
    handler.handle(warning("Invalid HTTP request received."))
    assert handler.lines[-1].left_out == 5_000 - BURST  # type: ignore[attr-defined]
    assert "left_out=4990" in TextFormatter().format(handler.lines[-1])


def test_kinds_of_lines_take_bounded_memory_and_news_is_never_thinned_out() -> None:
    handler = Lines()
    for number in range(1_000):
        handler.handle(warning(f"kind {number}"))
        handler.handle(warning("started", logging.INFO))
    (filtered,) = handler.filters
    assert isinstance(filtered, RepeatFilter)
    assert len(filtered._kinds) == KINDS
    assert len(handler.lines) == 2_000
