"""``pronk keys``: what it writes, what it leaves as it was, and what it prints once."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from service.cli import app
from service.keys import editing
from service.keys.editing import add_key, change_key
from service.keys.file import KeysProblem, parse_keys
from service.keys.key import Key, hash_of
from service.keys.keyring import Keyring

HASH = hash_of("a-key")
WRITTEN = f"""\
# ours
[keys.alice]  # the first
weight = 2.0  # twice
sha256 = "{HASH}"
models = [
    "tiny",
]

[keys."b.c"]
sha256 = "{hash_of("b")}"
disabled = false  # for now
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "keys.toml"
    path.write_text(WRITTEN)
    path.chmod(0o640)
    return path


def keys_in(path: Path) -> dict[str, Key]:
    return {key.name: key for key in parse_keys(path.read_bytes(), path)}


def run(*arguments: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, ["keys", *arguments], input=stdin)


def test_a_new_key_is_printed_once_and_kept_as_a_hash(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    made = run("new", "alice", "--file", str(path))
    secret = made.stdout.strip()
    assert secret.startswith("pronk-")
    assert secret not in path.read_text()
    assert secret not in made.stderr
    assert path.stat().st_mode & 0o777 == 0o600
    found = Keyring([], path).find(secret)
    assert found is not None
    assert found.name == "alice"
    assert found.id.startswith("key_")


def test_every_option_lands_in_its_field(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    options = "--admin --weight 2.5 --rpm 60 --tpm 1000 --max-concurrency 3 --tokens-per-day 5"
    more = "--tokens-per-month 6 --model tiny --model a/b --expires 2030-01-31"
    made = run("new", "alice", "-f", str(path), *options.split(), *more.split())
    assert made.exit_code == 0, made.stderr
    key = keys_in(path)["alice"]
    assert key == Key(
        name="alice",
        id=key.id,
        sha256=key.sha256,
        admin=True,
        models=frozenset({"tiny", "a/b"}),
        requests_per_minute=60,
        tokens_per_minute=1000,
        max_concurrency=3,
        tokens_per_day=5,
        tokens_per_month=6,
        weight=2.5,
        expires=datetime(2030, 1, 31, tzinfo=UTC),
    )


def test_what_stood_in_the_file_stays_comments_and_mode_too(path: Path) -> None:
    assert run("new", "dora", "-f", str(path)).exit_code == 0
    assert path.read_text().startswith(WRITTEN)
    assert path.stat().st_mode & 0o777 == 0o640
    assert list(path.parent.iterdir()) == [path], "nothing is left beside it"


@pytest.mark.parametrize("name", ["alice", "b.c"])
def test_a_revoked_key_opens_no_more_and_all_else_stays(path: Path, name: str) -> None:
    before = keys_in(path)
    assert run("revoke", name, "-f", str(path)).exit_code == 0
    after = keys_in(path)
    assert after.pop(name).disabled
    before.pop(name)
    assert after == before
    for comment in ("# ours", "# the first", "# twice", "# for now"):
        assert comment in path.read_text()


def test_a_rotated_key_keeps_its_id_though_none_was_written(path: Path) -> None:
    before = keys_in(path)["alice"]
    secret = run("rotate", "alice", "-f", str(path)).stdout.strip()
    keyring = Keyring([], path)
    found = keyring.find(secret)
    assert found is not None
    assert (found.id, found.name) == (before.id, "alice")
    assert keyring.find("a-key") is None


def test_names_are_given_once(path: Path) -> None:
    again = run("new", "alice", "-f", str(path))
    assert again.exit_code == 1
    assert "already" in again.stderr
    assert path.read_text() == WRITTEN


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("new", "a b"), "NAME takes"),
        (("new", "(api-key)"), "NAME takes"),
        (("new", "x", "--weight", "0"), "weight: "),
        (("new", "x", "--weight", "nan"), "weight: "),
        (("new", "x", "--expires", "tomorrow"), "--expires takes"),
        (("new", "x", "--rpm", "0"), "Invalid value for '--rpm'"),
        (("revoke", "nobody"), "has no key nobody"),
        (("rotate", "nobody"), "has no key nobody"),
    ],
)
def test_mistakes_are_one_line_and_change_nothing(
    path: Path, arguments: tuple[str, ...], said: str
) -> None:
    failed = run(*arguments, "-f", str(path))
    assert failed.exit_code != 0
    assert said in failed.stderr
    assert failed.stdout == ""
    assert path.read_text() == WRITTEN


@pytest.mark.parametrize(
    "text",
    [
        f'keys = {{ alice = {{ sha256 = "{HASH}" }} }}\n',
        f'keys.alice.sha256 = "{HASH}"\n',
        f'[keys]\nalice = {{ sha256 = "{HASH}" }}\n',
        f'# [keys.alice]\n[ keys . "\\u0061lice" ]\nsha256 = "{HASH}"\n',
        f'[keys.alice]\nsha256 = "{HASH}"\n"disabled" = false\n',
    ],
)
def test_what_it_cannot_change_with_certainty_is_left_to_a_hand(tmp_path: Path, text: str) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(text)
    failed = run("revoke", "alice", "-f", str(path))
    assert failed.exit_code == 1
    assert len(failed.stderr.splitlines()) == 1
    assert path.read_text() == text


def test_a_missing_file_is_made_by_new_alone(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    assert run("revoke", "alice", "-f", str(path)).exit_code == 1
    assert not path.exists()
    failed = run("new", "alice", "-f", str(tmp_path / "no" / "keys.toml"))
    assert failed.exit_code == 1
    assert "No such file" in failed.stderr
    assert failed.stdout == "", "a key nobody keeps is not shown"


def test_a_crash_while_it_writes_leaves_the_old_file(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(one: object, other: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(editing.os, "replace", fail)
    with pytest.raises(KeysProblem, match="No space left"):
        change_key(path, "alice", {"disabled": True})
    assert path.read_text() == WRITTEN
    assert list(path.parent.iterdir()) == [path]


def test_a_link_stays_a_link(path: Path) -> None:
    link = path.with_name("link.toml")
    link.symlink_to(path)
    assert run("new", "dora", "-f", str(link)).exit_code == 0
    assert link.is_symlink()
    assert "dora" in keys_in(path)


def test_keys_made_at_the_same_time_are_all_kept(path: Path) -> None:
    def add(number: int) -> None:
        add_key(path, Key(name=f"k{number}", sha256=hash_of(str(number))))

    threads = [threading.Thread(target=add, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert keys_in(path).keys() == {"alice", "b.c", *(f"k{number}" for number in range(16))}


def test_the_list_tells_states_and_limits_and_no_hash(path: Path) -> None:
    run("new", "dora", "-f", str(path), "--rpm", "60", "--expires", "2020-01-01")
    run("revoke", "b.c", "-f", str(path))
    shown = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["keys", "list", "-f", str(path)]).stdout
    lines = {line.split()[0]: line for line in shown.splitlines()}
    assert "active" in lines["alice"]
    assert "tiny" in lines["alice"]
    assert "revoked" in lines["b.c"]
    assert "expired" in lines["dora"]
    assert "60 requests/min" in lines["dora"]
    assert HASH not in shown


def test_a_hash_is_made_of_what_comes_on_standard_input() -> None:
    assert run("hash", stdin="a-key\n").stdout.strip() == HASH
    assert run("hash", stdin="").exit_code == 1


def test_the_file_is_named_in_the_environment_as_for_the_server(path: Path) -> None:
    environment = {**os.environ, "PRONK_API_KEYS_FILE": str(path)}
    command = [sys.executable, "-m", "service.cli", "keys", "list"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "alice" in done.stdout
