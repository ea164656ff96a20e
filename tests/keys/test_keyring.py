"""Which keys open, and what a changed or broken file changes."""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from service.keys.file import KeysProblem
from service.keys.key import hash_of
from service.keys.keyring import Keyring


def entry(name: str, secret: str, more: str = "") -> str:
    return f'[keys.{name}]\nsha256 = "{hash_of(secret)}"\n{more}\n'


GOOD = entry("alice", "alices")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "keys.toml"
    write(path, GOOD)
    path.chmod(0o600)
    return path


def write(path: Path, content: str | bytes | None) -> None:
    """None: there is no such file any more."""
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def name_of(keyring: Keyring, offered: str) -> str | None:
    key = keyring.find(offered)
    return None if key is None else key.name


def test_a_server_is_open_only_where_nobody_speaks_of_keys(tmp_path: Path) -> None:
    (tmp_path / "none.toml").touch(0o600)
    assert Keyring().is_open
    assert not Keyring(["a"]).is_open
    assert not Keyring([], tmp_path / "none.toml").is_open


def test_keys_of_both_sources_open_and_those_of_the_flag_have_every_right(path: Path) -> None:
    keyring = Keyring(["flag", "second"], path)
    assert name_of(keyring, "alices") == "alice"
    assert name_of(keyring, "flag") == "(api-key)"
    assert name_of(keyring, "second") == "(api-key 2)"
    assert name_of(keyring, keyring.own_key) == "(server)"
    assert name_of(keyring, "other") is None
    assert name_of(keyring, "") is None
    assert [key.name for key in keyring.keys if key.admin] == [
        "(api-key)",
        "(api-key 2)",
        "(server)",
    ]
    assert [key.name for key in keyring.from_file] == ["alice"]


def test_the_hash_itself_opens_nothing(path: Path) -> None:
    assert name_of(Keyring([], path), hash_of("alices")) is None


def test_every_key_is_compared_whichever_it_is(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_text("".join(entry(f"k{n}", f"secret{n}") for n in range(20)))
    keyring = Keyring(["flag"], path)
    compared = 0

    def compare(one: bytes, other: bytes) -> bool:
        nonlocal compared
        compared += 1
        return one == other

    monkeypatch.setattr(hmac, "compare_digest", compare)
    counts = []
    for offered in ("secret0", "secret19", "flag", "wrong"):
        compared = 0
        keyring.find(offered)
        counts.append(compared)
    assert counts == [22] * 4


def test_a_key_in_the_file_that_is_also_a_flags_is_refused(path: Path) -> None:
    with pytest.raises(KeysProblem, match="same sha256"):
        Keyring(["alices"], path)


def test_a_broken_file_is_an_error_at_the_start(path: Path) -> None:
    path.write_text("[keys.")
    with pytest.raises(KeysProblem, match="not TOML"):
        Keyring([], path)


async def test_a_changed_file_is_taken_and_the_callers_are_told(path: Path) -> None:
    keyring, seen = Keyring([], path), []
    keyring.on_change.append(lambda keys: seen.append([key.name for key in keys]))
    write(path, entry("bob", "bobs"))
    await keyring.reload()
    assert (name_of(keyring, "bobs"), name_of(keyring, "alices")) == ("bob", None)
    await keyring.reload()
    assert seen == [["bob"]], "told once for one change"
    assert keyring.num_reloads == 1


@pytest.mark.parametrize("broken", [b"[keys.", b"[keys.alice]\n", b"\xff", None])
async def test_a_broken_file_keeps_the_old_keys_and_is_told_of_once(
    path: Path, broken: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    keyring = Keyring([], path)
    write(path, broken)
    with caplog.at_level(logging.ERROR, "pronk.keys"):
        for _ in range(3):
            await keyring.reload()
    assert name_of(keyring, "alices") == "alice"
    assert not keyring.is_current
    [record] = caplog.records
    assert "stay in force" in record.getMessage()
    write(path, GOOD)  # exactly what it was before
    await keyring.reload()
    assert keyring.is_current


async def test_a_bug_in_reading_ends_no_watch(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or no key could be revoked until the next start."""
    keyring = Keyring([], path)
    with monkeypatch.context() as broken:
        broken.setattr("service.keys.keyring.parse_keys", lambda *_: 1 // 0)
        write(path, entry("bob", "bobs"))
        await keyring.reload()
        assert not keyring.is_current
    await keyring.reload()
    assert (name_of(keyring, "bobs"), name_of(keyring, "alices")) == ("bob", None)


async def test_the_watch_sees_files_that_are_rewritten_and_replaced(path: Path) -> None:
    keyring = Keyring([], path)
    watch = asyncio.create_task(keyring.watch(0.01))
    try:
        write(path, entry("bob", "bobs0"))
        await until(lambda: name_of(keyring, "bobs0"))
        other = path.with_name("other")
        write(other, entry("bob", "bobs1"))
        os.replace(other, path)
        await until(lambda: name_of(keyring, "bobs1"))
        dates = os.stat(path)
        write(path, entry("bob", "bobs2"))  # of the same size, and as old as it was
        os.utime(path, ns=(dates.st_atime_ns, dates.st_mtime_ns))
        await until(lambda: name_of(keyring, "bobs2"))
    finally:
        watch.cancel()
        await asyncio.gather(watch, return_exceptions=True)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
