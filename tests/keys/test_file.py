"""The keys file: what it may say, and one clear line for what it may not."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.keys.file import MOST_BYTES, MOST_KEYS, KeysProblem, exposure, parse_keys, read_bytes
from service.keys.key import Key, hash_of, new_key

HASH = hash_of("a-key")
PATH = Path("keys.toml")


def parse(text: str) -> tuple[Key, ...]:
    return parse_keys(text.encode(), PATH)


def test_an_entry_needs_no_more_than_a_hash() -> None:
    [key] = parse(f'[keys.alice]\nsha256 = "{HASH}"\n')
    assert key == Key(name="alice", id=HASH[:16], sha256=HASH)
    assert (key.admin, key.models, key.weight, key.disabled) == (False, None, 1.0, False)


def test_every_field_is_read() -> None:
    [key] = parse(
        f"""
        [keys."team.a"]
        id = "key_1"
        sha256 = "{HASH}"
        admin = true
        models = ["tiny", "a/lora"]
        requests_per_minute = 60
        tokens_per_minute = 20_000
        max_concurrency = 4
        tokens_per_day = 1_000_000
        tokens_per_month = 20_000_000
        weight = 2
        expires = 2030-01-31T00:00:00Z
        disabled = true
        """
    )
    assert key.name == "team.a"
    assert key.models == {"tiny", "a/lora"}
    assert key.is_expired(1_896_048_000)
    assert not key.is_expired(1_896_047_999.9)


def test_a_file_without_keys_lets_nobody_in_and_is_no_mistake() -> None:
    assert parse("# none yet\n") == ()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[keys.a", "not TOML"),
        ("a = 1", "'a'"),
        ("keys = 3", r"table \[keys.NAME\]"),
        ("keys = [1]", r"table \[keys.NAME\]"),
        ("[keys.a]", "keys.a.sha256: Field required"),
        ('[keys.a]\nsha256 = "no-hash-but-perhaps-a-key"', "keys.a.sha256: String should match"),
        (f'[keys.a]\nsha256 = "{HASH.upper()}"', "sha256"),
        (f'[keys.a]\nsha256 = "{hash_of("")}"', "hash of nothing"),
        (f'[keys.a]\nsha256 = "{HASH}"\nrpm = 3', "unknown rpm; known: .*requests_per_minute"),
        (f'[keys.a]\nsha256 = "{HASH}"\nname = "b"', "a key's name is its table's"),
        (f'[keys.a]\nsha256 = "{HASH}"\nweight = 0', "keys.a.weight"),
        (f'[keys.a]\nsha256 = "{HASH}"\nweight = nan', "keys.a.weight"),
        (f'[keys.a]\nsha256 = "{HASH}"\nadmin = 1', "keys.a.admin"),
        (f'[keys.a]\nsha256 = "{HASH}"\nadmin = "false"', "keys.a.admin"),
        (f'[keys.a]\nsha256 = "{HASH}"\nmodels = []', "keys.a.models: is a list of one or more"),
        (f'[keys.a]\nsha256 = "{HASH}"\nmodels = [1]', "keys.a.models"),
        (f'[keys.a]\nsha256 = "{HASH}"\nmodels = "tiny"', "keys.a.models"),
        (f'[keys.a]\nsha256 = "{HASH}"\nrequests_per_minute = 0', "requests_per_minute"),
        (f'[keys.a]\nsha256 = "{HASH}"\nrequests_per_minute = 1.5', "requests_per_minute"),
        (f'[keys.a]\nsha256 = "{HASH}"\nexpires = 2030-01-31T00:00:00', "needs a time zone"),
        (f'[keys.a]\nsha256 = "{HASH}"\nexpires = 2030-01-31', "keys.a.expires"),
        (f'[keys.a]\nsha256 = "{HASH}"\nrequests_per_minute = {"1" * 5000}', "not TOML"),
        (f'[keys."a b"]\nsha256 = "{HASH}"', "1 to 64 letters"),
        (f'[keys."(api-key)"]\nsha256 = "{HASH}"', "a key's name"),
        (f'[keys.a]\nsha256 = "{HASH}"\n[keys.b]\nsha256 = "{HASH}"', "a and b have the same sha"),
        (f'[keys.a]\nsha256="{HASH}"\n[keys.a]\nsha256="{HASH}"', "not TOML"),
    ],
)
def test_a_mistake_is_one_line_that_names_it_and_shows_no_hash(text: str, said: str) -> None:
    with pytest.raises(KeysProblem, match=said) as caught:
        parse(text)
    line = str(caught.value)
    assert "\n" not in line
    assert HASH not in line
    assert "perhaps-a-key" not in line


def test_files_without_end_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_bytes(b"#" * (MOST_BYTES + 1))
    with pytest.raises(KeysProblem, match="larger than"):
        read_bytes(path)
    with pytest.raises(KeysProblem, match="no regular file"):
        read_bytes(tmp_path)
    with pytest.raises(KeysProblem, match="No such file"):
        read_bytes(tmp_path / "missing")
    with pytest.raises(KeysProblem, match="not UTF-8"):
        parse_keys(b"\xff", PATH)
    many = "".join(f'[keys.k{n}]\nsha256 = "{n:064x}"\n' for n in range(MOST_KEYS + 1))
    with pytest.raises(KeysProblem, match="more than 4096 keys"):
        parse(many)


@pytest.mark.parametrize(
    ("mode", "said"),
    [(0o600, None), (0o640, None), (0o644, "may read"), (0o660, "may write"), (0o606, "may write")],
)
def test_a_file_others_may_touch_is_told_of(tmp_path: Path, mode: int, said: str | None) -> None:
    path = tmp_path / "keys.toml"
    path.touch()
    path.chmod(mode)
    warning = exposure(path)
    assert (warning is None) if said is None else (warning is not None and said in warning)


def test_keys_hold_256_bits_and_never_come_twice() -> None:
    keys = {new_key() for _ in range(1000)}
    assert len(keys) == 1000
    assert all(key.startswith("pronk-") and len(key) == 6 + 43 for key in keys)
