"""Log lines for people (text) or machines (JSON), one a record, whatever a message contains.

Prompts and answers are never logged unless ``--log-content`` says so.
"""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message"}


def _extras(record: logging.LogRecord) -> dict[str, object]:
    return {key: value for key, value in vars(record).items() if key not in _STANDARD}


def _escape(text: str) -> str:
    """Control characters would let a client forge lines or drive the reader's terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class TextFormatter(logging.Formatter):
    """``21:04:07 info  engine  ready  key=value``; tracebacks only at debug level."""

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        name = record.name.removeprefix("pronk.")
        extras = "".join(f"  {key}={_escape(str(v))}" for key, v in _extras(record).items())
        message = "\n".join(_escape(line) for line in record.getMessage().split("\n"))
        line = f"{clock} {record.levelname.lower():<7} {name:<8} {message}{extras}"
        return line + _traceback(record)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message and the record's extras."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, object] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        entry |= _extras(record)
        if trace := _traceback(record):
            entry["traceback"] = trace.strip()
        return json.dumps(entry, default=str)


def _traceback(record: logging.LogRecord) -> str:
    """The whole trace at debug level, else only where it was raised: values may hold prompts."""
    if not record.exc_info or record.exc_info[1] is None:
        return ""
    if logging.getLogger().isEnabledFor(logging.DEBUG):
        return "\n" + "".join(traceback.format_exception(record.exc_info[1])).rstrip()
    frames = traceback.extract_tb(record.exc_info[2])
    where = f" at {frames[-1].name}:{frames[-1].lineno}" if frames else ""
    return f"  ({type(record.exc_info[1]).__name__}{where})"


def configure_logging(level: str, style: str) -> None:
    """Route everything, uvicorn's records too, through one handler on standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if style == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    logging.getLogger("uvicorn.error").setLevel(max(logging.WARNING, root.level))
    for name in ("httpx", "httpcore", "asyncio", "urllib3", "filelock"):
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))
