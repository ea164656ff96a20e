"""Log lines: one a record, whatever a message holds."""

from __future__ import annotations

import json
import logging

from service.logs import JsonFormatter, TextFormatter


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
