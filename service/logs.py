"""Log lines for people (text) or machines (JSON), one a record, whatever a message contains.

Prompts and answers are never logged unless ``--log-content`` says so. An exception's own words may
quote them (``invalid literal: 'what the client sent'``), so without it only its type and place are
told. What other libraries say at debug level is told to nobody.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import time
import traceback
from collections.abc import Iterator
from typing import TextIO

from service.log_bounds import LONGEST, RepeatFilter, shorten
from service.log_context import AboutRequest

OWN = ("pronk", "service", "model")  # our loggers
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message"}


def _extras(record: logging.LogRecord) -> dict[str, object]:
    return {key: _bounded(value) for key, value in vars(record).items() if key not in _STANDARD}


def _bounded(value: object) -> object:
    if isinstance(value, bool | int | float | None):
        return value
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return value if len(text) <= LONGEST else shorten(text)


def _escape(text: str) -> str:
    """Control characters would let a client forge lines or drive the reader's terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class _Formatter(logging.Formatter):
    def __init__(self, *, has_traces: bool = False, has_content: bool = False) -> None:
        super().__init__()
        self._has_traces = has_traces
        self._has_content = has_content

    def _trace(self, record: logging.LogRecord) -> str:
        """The whole trace at debug level, else only where it was raised."""
        error = record.exc_info[1] if record.exc_info else None
        if error is None:
            return ""
        if self._has_traces:
            return "\n" + shorten("\n".join(_chain(error, self._has_content)))
        frames = traceback.extract_tb(error.__traceback__)
        where = f" at {frames[-1].name}:{frames[-1].lineno}" if frames else ""
        return f"  ({type(error).__name__}{where})"


class TextFormatter(_Formatter):
    """``21:04:07 info  engine  ready  key=value``; tracebacks only at debug level."""

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        name = record.name.removeprefix("pronk.")
        extras = "".join(f"  {key}={_escape(str(v))}" for key, v in _extras(record).items())
        message = "\n".join(_escape(line) for line in shorten(record.getMessage()).split("\n"))
        line = f"{clock} {record.levelname.lower():<7} {name:<8} {message}{extras}"
        return line + self._trace(record)


class JsonFormatter(_Formatter):
    """One JSON object a line: time, level, logger, message and the record's extras."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, object] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": shorten(record.getMessage()),
        }
        entry |= _extras(record)
        if trace := self._trace(record):
            entry["traceback"] = trace.strip()
        return json.dumps(entry, default=str)


class _Handler(logging.StreamHandler[TextIO]):
    def handleError(self, record: logging.LogRecord) -> None:
        """A line that cannot be formatted or written: Python's own would print its arguments."""
        with contextlib.suppress(OSError, ValueError):
            self.stream.write(f"a line of {record.name}:{record.lineno} could not be logged\n")


def _chain(error: BaseException, has_content: bool) -> Iterator[str]:
    """As Python prints it, the cause first, with the words of an exception where they may be."""
    if error.__cause__ is not None:
        yield from _chain(error.__cause__, has_content)
        yield "which was the cause of:"
    elif error.__context__ is not None and not error.__suppress_context__:
        yield from _chain(error.__context__, has_content)
        yield "and while it was handled:"
    yield "Traceback (most recent call last):"
    yield "".join(traceback.format_tb(error.__traceback__)).rstrip()
    yield f"{type(error).__qualname__}: {_escape(_words(error, has_content))}"
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _chain(inner, has_content)


def _words(error: BaseException, has_content: bool) -> str:
    """The system's and the device's own are no client's."""
    if has_content or type(error).__module__.split(".")[0] == "torch":
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return "(its words may quote a request; --log-content shows them)"


def configure_logging(level: str, style: str, *, has_content: bool = False) -> None:
    """Route everything, uvicorn's records too, through one handler on standard error."""
    formatter = JsonFormatter if style == "json" else TextFormatter
    handler = _Handler(sys.stderr)
    handler.addFilter(RepeatFilter())
    handler.addFilter(AboutRequest())
    handler.setFormatter(formatter(has_traces=level == "debug", has_content=has_content))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(logging.INFO, logging.getLevelName(level.upper())))
    for name in OWN:
        logging.getLogger(name).setLevel(level.upper())
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    for name in ("uvicorn.error", "httpx", "httpcore", "asyncio", "urllib3", "filelock"):
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))
