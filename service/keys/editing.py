"""Changing the keys file by its text, so that comments and order stay: what is written is read
again first, and must say what was meant."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import tempfile
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from service.keys.file import KeysProblem, parse_keys, read_bytes
from service.keys.key import Key

HEAD = """\
# pronk's API keys: `pronk keys new NAME` adds one, `pronk keys revoke NAME` ends one.
# Only hashes are kept. A running server reads this file again when it changes.
"""
ANY_TABLE = re.compile(r"^\s*\[", re.MULTILINE)


def add_key(path: Path, key: Key) -> None:
    """Raises ``KeysProblem`` where there is one of that name, or the file cannot be written."""
    with editing(path) as text:
        keys = parse_keys(text.encode(), path)
        if any(known.name == key.name for known in keys):
            raise KeysProblem(f"{path} has a key {key.name} already: revoke it, or rotate it")
        separator = "" if not text or text.endswith("\n") else "\n"
        replace(path, f"{text or HEAD}{separator}\n{entry(key)}", (*keys, key))


def change_key(path: Path, name: str, changes: dict[str, Any]) -> Key:
    """Set fields of one key; the key as it is now. Raises ``KeysProblem``."""
    read_bytes(path)  # a file that is not there is not made
    with editing(path) as text:
        keys = parse_keys(text.encode(), path)
        position = next((i for i, known in enumerate(keys) if known.name == name), None)
        if position is None:
            raise KeysProblem(f"{path} has no key {name}")
        changed = Key.model_validate(keys[position].model_dump() | changes)
        written = text
        for field, value in changes.items():
            written = _set_field(written, name, field, value, path)
        replace(path, written, (*keys[:position], changed, *keys[position + 1 :]))
        return changed


def entry(key: Key) -> str:
    """Its table; what is at its default is left out."""
    values = key.model_dump(exclude_defaults=True)
    lines = [f"{field} = {_toml(value)}" for field, value in values.items() if field != "name"]
    return "\n".join([f"[keys.{_table_name(key.name)}]", *lines, ""])


def _set_field(text: str, name: str, field: str, value: Any, path: Path) -> str:
    """In the key's table, in place of the field's line or as its first."""
    spelled = rf"(?:{re.escape(name)}|\"{re.escape(name)}\"|'{re.escape(name)}')"
    header = re.search(rf"^[ \t]*\[\s*keys\s*\.\s*{spelled}\s*\][^\n]*$", text, re.MULTILINE)
    if header is None:
        raise KeysProblem(f"{path}: {name} is no table [keys.{name}]; change it by hand")
    following = ANY_TABLE.search(text, header.end())
    end = len(text) if following is None else following.start()
    body, line = text[header.end() : end], f"{field} = {_toml(value)}"
    pattern = re.compile(rf"^[ \t]*{field}[ \t]*=[^\n#]*?(?=[ \t]*(?:#|$))", re.MULTILINE)
    body, count = pattern.subn(lambda _: line, body, count=1)
    if not count:
        body = f"\n{line}{body}"
    return text[: header.end()] + body + text[end:]


def _table_name(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else f'"{name}"'


def _toml(value: Any) -> str:
    """JSON's spelling is TOML's for texts, numbers, truth and lists."""
    if isinstance(value, datetime):
        return value.isoformat()
    return json.dumps(sorted(value) if isinstance(value, frozenset) else value, ensure_ascii=False)


@contextlib.contextmanager
def editing(path: Path) -> Iterator[str]:
    """The text of the file, made where there is none, while nobody else may edit it."""
    try:
        with _locked(path.resolve()):
            yield read_bytes(path).decode()
    except UnicodeDecodeError:
        raise KeysProblem(f"the keys file {path} is not UTF-8") from None
    except OSError as error:
        raise KeysProblem(f"cannot write the keys file {path}: {error.strerror}") from None


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """The lock is on the file itself; who waited for one that was replaced takes the new one's."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                yield
                return
        finally:
            os.close(descriptor)


def replace(path: Path, text: str, meant: tuple[Key, ...]) -> None:
    """In one step: a reader, or a crash, finds the old file or the new one. Keeps its mode."""
    content = text.encode()
    if parse_keys(content, path) != meant:
        raise KeysProblem(f"{path} is written in a way only a hand can change; nothing was changed")
    target = path.resolve()
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            status = os.stat(target)
            os.fchmod(file.fileno(), status.st_mode & 0o777)
            if (status.st_uid, status.st_gid) != (os.geteuid(), os.getegid()):
                os.fchown(file.fileno(), status.st_uid, status.st_gid)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, target)
    except BaseException:
        os.unlink(name)
        raise
    _sync_folder(target.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
