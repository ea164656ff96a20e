"""Records for these tests, and a look at what a file holds."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

from service.ledger.record import Record

NOON = 1_767_268_800.0  # 2026-01-01T12:00:00Z
DAY = 86_400.0


def sample(number: int = 0, **fields: Any) -> Record:
    """A finished request: 10 prompt tokens, 5 generated, 1 discarded."""
    known: dict[str, Any] = {
        "time": NOON + number,
        "request_id": f"req-{number}",
        "key_id": "k1",
        "key_name": "ann",
        "route": "/v1/completions",
        "model": "tiny",
        "status": 200,
        "finish": "stop",
        "num_choices": 1,
        "prompt_tokens": 10,
        "cached_tokens": 4,
        "generated_tokens": 5,
        "discarded_tokens": 1,
        "engine_prompt_tokens": 10,
        "engine_generated_tokens": 6,
        "queue_seconds": 0.25,
        "total_seconds": 0.5,
    }
    return Record(**known | fields)


def select(path: Path, query: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(query).fetchall()


def numbers(path: Path) -> list[int]:
    return [row[0] for row in select(path, "SELECT sequence FROM records ORDER BY id")]
