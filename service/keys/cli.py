"""``pronk keys``: making, listing, rotating and revoking the keys of a file."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from service.keys.key import Key

app = typer.Typer(
    help="Make, list, rotate and revoke the API keys of a file (--api-keys-file).",
    no_args_is_help=True,
    rich_markup_mode=None,
)

File = Annotated[
    Path,
    typer.Option(
        "--file", "-f", envvar="PRONK_API_KEYS_FILE", help="The keys file", dir_okay=False
    ),
]
Limit = Annotated[int | None, typer.Option(min=1)]
UNITS = {"h": "hours", "d": "days", "w": "weeks"}


@app.command()
def new(
    name: Annotated[str, typer.Argument(help="What metrics and the ledger call the key")],
    file: File,
    admin: Annotated[bool, typer.Option("--admin", help="May use admin routes")] = False,
    model: Annotated[
        list[str] | None,
        typer.Option(help="A model or adapter it may use, repeatable; default: all"),
    ] = None,
    rpm: Annotated[int | None, typer.Option(min=1, help="Requests a minute")] = None,
    tpm: Annotated[int | None, typer.Option(min=1, help="Tokens a minute")] = None,
    max_concurrency: Annotated[
        int | None, typer.Option(min=1, help="Requests answered at a time")
    ] = None,
    tokens_per_day: Limit = None,
    tokens_per_month: Limit = None,
    weight: Annotated[float, typer.Option(help="Share of the device beside other keys")] = 1.0,
    expires: Annotated[
        str | None, typer.Option(help="When it ends: 2030-01-31, a time with zone, 12h, 30d, 8w")
    ] = None,
) -> None:
    """Make a key, print it once and add its hash to the file."""
    from service.keys.editing import add_key
    from service.keys.key import hash_of, new_id, new_key

    secret = new_key()
    fields = {
        "name": name,
        "id": new_id(),
        "sha256": hash_of(secret),
        "admin": admin,
        "models": model,
        "requests_per_minute": rpm,
        "tokens_per_minute": tpm,
        "max_concurrency": max_concurrency,
        "tokens_per_day": tokens_per_day,
        "tokens_per_month": tokens_per_month,
        "weight": weight,
        "expires": None if expires is None else read_expiry(expires),
    }
    with one_line():
        add_key(file, checked(fields))
    show(secret, f"key {name} added to {file}; it is shown this once")


@app.command()
def rotate(name: str, file: File) -> None:
    """Give a key a new secret; its id, limits and books stay, the old secret ends."""
    from service.keys.editing import change_key
    from service.keys.key import hash_of, new_key

    secret = new_key()
    with one_line():
        known = next((key for key in keys_of(file) if key.name == name), None)
        if known is None:
            fail(f"{file} has no key {name}")
        change_key(file, name, {"id": known.id, "sha256": hash_of(secret)})
    show(secret, f"key {name} rotated in {file}; it is shown this once")


@app.command()
def revoke(name: str, file: File) -> None:
    """End a key: its entry stays, disabled, so that its name and id are not given again."""
    from service.keys.editing import change_key

    with one_line():
        change_key(file, name, {"disabled": True})
    print(f"key {name} revoked in {file}", file=sys.stderr)


@app.command("list")
def list_keys(file: File) -> None:
    """Every key of the file with its state, rights and limits."""
    from rich.console import Console
    from rich.table import Table

    with one_line():
        keys = keys_of(file)
    table = Table(box=None, pad_edge=False)
    for column in ("name", "id", "state", "rights", "models", "weight", "limits"):
        table.add_column(column, overflow="fold")
    now = time.time()
    for key in keys:
        state = "revoked" if key.disabled else "expired" if key.is_expired(now) else "active"
        models = "all" if key.models is None else " ".join(sorted(key.models))
        rights = "admin" if key.admin else "user"
        table.add_row(key.name, key.id, state, rights, models, f"{key.weight:g}", limits_of(key))
    Console(highlight=False, markup=False).print(table)


@app.command("hash")
def hash_key() -> None:
    """Read a key from standard input and print its SHA-256, for an entry written by hand."""
    from service.keys.key import hash_of

    key = sys.stdin.readline().strip()
    if not key:
        fail("no key came on standard input")
    print(hash_of(key))


def keys_of(file: Path) -> Sequence[Key]:
    from service.keys.file import parse_keys, read_bytes

    return parse_keys(read_bytes(file), file)


def limits_of(key: Key) -> str:
    named = {
        "requests_per_minute": "requests/min",
        "tokens_per_minute": "tokens/min",
        "max_concurrency": "at a time",
        "tokens_per_day": "tokens/day",
        "tokens_per_month": "tokens/month",
    }
    limits = [
        f"{getattr(key, field):,} {unit}" for field, unit in named.items() if getattr(key, field)
    ]
    if key.expires is not None:
        limits.append(f"until {key.expires.isoformat()}")
    return ", ".join(limits) or "none"


def checked(fields: dict[str, Any]) -> Key:
    """The key of these fields, or one line that names the wrong one."""
    from pydantic import ValidationError

    from service.keys.key import NAME, Key

    if not NAME.fullmatch(fields["name"]):
        fail("NAME takes 1 to 64 letters, digits, dots, dashes and underscores", code=2)
    try:
        return Key.model_validate({k: v for k, v in fields.items() if v is not None})
    except ValidationError as error:
        problem = error.errors()[0]
        fail(f"{problem['loc'][0]}: {problem['msg'].removeprefix('Value error, ')}", code=2)


def read_expiry(text: str) -> datetime:
    if found := re.fullmatch(r"(\d{1,5})([hdw])", text):
        now = datetime.now(UTC).replace(microsecond=0)
        return now + timedelta(**{UNITS[found[2]]: int(found[1])})
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        fail(f"--expires takes 2030-01-31, a time with zone, 12h, 30d or 8w, not {text}", code=2)
    return when if when.tzinfo else when.replace(tzinfo=UTC)


@contextmanager
def one_line() -> Iterator[None]:
    """What is wrong with the file is told in a line."""
    from service.keys.file import KeysProblem

    try:
        yield
    except KeysProblem as problem:
        fail(str(problem))


def show(secret: str, said: str) -> None:
    """The secret alone on standard output, so that it can be piped where it belongs."""
    print(said, file=sys.stderr)
    print(secret)


def fail(message: str, code: int = 1) -> NoReturn:
    print(f"pronk: {message}", file=sys.stderr)
    raise typer.Exit(code)
