"""Settings: precedence, bounds, and one readable line a mistake."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from service.settings import Settings, SettingsProblem, read_settings
from tests.running import ROOT


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"PRONK_{name.upper()}", raising=False)


def test_flags_beat_the_environment_which_beats_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "pronk.toml"
    file.write_text('port = 1\nhost = "file"\nmax-num-seqs = 3\n')
    monkeypatch.setenv("PRONK_HOST", "environment")
    monkeypatch.setenv("PRONK_PORT", "2")
    settings = read_settings(["--config", str(file), "--port", "3"])
    assert (settings.port, settings.host, settings.max_num_seqs) == (3, "environment", 3)


def test_the_file_can_be_named_in_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.toml").write_text("port = 7\n")
    monkeypatch.setenv("PRONK_CONFIG", str(tmp_path / "a.toml"))
    assert read_settings([]).port == 7


def test_lists_come_repeated_comma_separated_or_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_settings(
        ["--served-model-name", "a", "--served-model-name", "b"]
    ).served_model_name == [
        "a",
        "b",
    ]
    monkeypatch.setenv("PRONK_API_KEY", "one,two")
    assert [key.get_secret_value() for key in read_settings([]).api_key] == ["one", "two"]
    assert read_settings(["--allowed-origins", '["*"]']).allowed_origins == ["*"]


@pytest.mark.parametrize("nothing", ["", " ", ",", "[]"])
def test_a_key_that_is_none_opens_no_server(monkeypatch: pytest.MonkeyPatch, nothing: str) -> None:
    """As of a script's ``--api-key "$KEY"`` without a KEY."""
    with pytest.raises(SettingsProblem, match="names no key"):
        read_settings(["--api-key", nothing])
    monkeypatch.setenv("PRONK_API_KEY", nothing)
    if nothing:
        with pytest.raises(SettingsProblem, match="names no key"):
            read_settings([])
    else:
        assert read_settings([]).api_key == []  # an empty variable is none


def test_keys_are_not_printed() -> None:
    assert "hunter2" not in repr(read_settings(["--api-key", "hunter2"]))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--port", "70000"], "port"),
        (["--bogus"], "--bogus"),
        (["--device", "tpu"], "device"),
        (["--block-size", "7"], "block-size"),
        (["--ssl-keyfile", "x"], "ssl_certfile"),
        (["--config", "/does/not/exist.toml"], "config"),
        (["--tensor-parallel-size", "2"], "tensor-parallel-size"),
        (["--kv-cache-dtype", "int4"], "kv-cache-dtype"),
        (["--host-cache-memory", "-1"], "host-cache-memory"),
        (["--host-cache-memory", "9", "--no-enable-prefix-caching"], "prefix caching"),
        (["one", "two"], "two"),
    ],
)
def test_a_mistake_is_named(arguments: list[str], words: str) -> None:
    with pytest.raises(SettingsProblem, match=words):
        read_settings(arguments)


def test_unknown_keys_are_refused_with_the_nearest_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.toml").write_text("prot = 7\n")
    with pytest.raises(SettingsProblem, match="did you mean port"):
        read_settings(["--config", str(tmp_path / "a.toml")])
    monkeypatch.setenv("PRONK_PROT", "7")
    with pytest.raises(SettingsProblem, match="PRONK_PROT"):
        read_settings([])


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        read_settings([]).port = 1  # type: ignore[misc]


def test_every_setting_is_described() -> None:
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []


def test_a_kept_connection_outlives_the_balancers() -> None:
    """Who closes first decides whether a request can meet a closing connection."""
    balancer = (ROOT / "deploy" / "haproxy.cfg").read_text()
    (seconds,) = re.findall(r"^\s*timeout http-keep-alive (\d+)s", balancer, re.MULTILINE)
    assert int(seconds) + 10 <= Settings().keep_alive
