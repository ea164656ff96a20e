"""The keys file: a TOML table for each key, under its name.

[keys.alice]
sha256 = "..."
"""

from __future__ import annotations

import os
import stat
import tomllib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from service.keys.key import Key

MOST_BYTES = 4 << 20
MOST_KEYS = 4096  # every one of them is compared with what a caller offers


class KeysProblem(ValueError):
    """The keys file cannot be used; the text says why in one line, and never holds a hash."""


def read_bytes(path: Path) -> bytes:
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise KeysProblem(f"the keys file {path} is no regular file")
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise KeysProblem(f"cannot read the keys file {path}: {error.strerror}") from None
    if len(content) > MOST_BYTES:
        raise KeysProblem(f"the keys file {path} is larger than {MOST_BYTES} bytes")
    return content


def parse_keys(content: bytes, path: Path) -> tuple[Key, ...]:
    """Raises ``KeysProblem``: one wrong entry refuses all, so that none is dropped in silence."""
    try:
        values = tomllib.loads(content.decode())
    except UnicodeDecodeError:
        raise KeysProblem(f"the keys file {path} is not UTF-8") from None
    except (ValueError, RecursionError) as error:  # also of a number with thousands of digits
        raise KeysProblem(f"the keys file {path} is not TOML: {error}") from None
    tables = values.pop("keys", {})
    if values:
        raise KeysProblem(
            f"the keys file {path} has {min(values)!r:.80} beside its keys: "
            "each key is a table [keys.NAME]"
        )
    if not isinstance(tables, dict) or not all(isinstance(one, dict) for one in tables.values()):
        raise KeysProblem(f"the keys file {path}: each key is a table [keys.NAME]")
    if len(tables) > MOST_KEYS:
        raise KeysProblem(f"the keys file {path} has more than {MOST_KEYS} keys")
    keys = tuple(_read_key(name, table, path) for name, table in tables.items())
    check_distinct(keys, path)
    return keys


def check_distinct(keys: Sequence[Key], path: Path) -> None:
    for what in ("sha256", "id"):
        counts = Counter(getattr(key, what) for key in keys)
        twice = [key.name for key in keys if counts[getattr(key, what)] > 1]
        if twice:
            raise KeysProblem(
                f"the keys file {path}: {' and '.join(twice[:3])} have the same {what}"
            )


def _read_key(name: str, table: dict[str, Any], path: Path) -> Key:
    where = f"the keys file {path}: keys.{name!s:.80}"
    if name.startswith("(") or "name" in table:
        raise KeysProblem(
            f"{where}: a key's name is its table's, of letters, digits, '.', '-', '_'"
        )
    try:
        return Key.model_validate({"name": name, **table})
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in problem["loc"] if not isinstance(part, int))
        if problem["type"] == "extra_forbidden":
            known = ", ".join(field for field in Key.model_fields if field != "name")
            raise KeysProblem(f"{where}: unknown {field}; known: {known}") from None
        message = problem["msg"].removeprefix("Value error, ")
        raise KeysProblem(f"{where}.{field}: {message}") from None


def exposure(path: Path) -> str | None:
    """What is wrong with who may touch the file."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return None
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"others may write the keys file {path}, and so let anybody in: chmod 600"
    if mode & stat.S_IROTH:
        return f"everybody on this machine may read the keys file {path}: chmod 600"
    return None
