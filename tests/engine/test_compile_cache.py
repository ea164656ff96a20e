"""Compiled kernels are kept in one stable folder, or the operator hears that they are not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from service.engine.compile_cache import FOLDERS, default_folder, use_compile_cache


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in FOLDERS:
        monkeypatch.setenv(variable, "")  # so that it is put back
        monkeypatch.delenv(variable)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_the_default_is_in_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert use_compile_cache(None) == tmp_path / "cache" / "pronk" / "compile"
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"].startswith(str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert default_folder() == Path("/home/somebody/.cache/pronk/compile")


def test_a_folder_can_be_told_and_the_operators_variables_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "/somewhere")
    assert use_compile_cache(str(tmp_path / "own")) == tmp_path / "own"
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "own" / "inductor")
    assert os.environ["TRITON_CACHE_DIR"] == "/somewhere"


def test_a_folder_that_cannot_be_written_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "pronk.engine")
    file = tmp_path / "file"
    file.touch()
    assert use_compile_cache(str(file / "below")) is None
    assert "not kept" in caplog.text
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ


def test_a_user_without_a_home_has_a_folder_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    assert default_folder().parts[-2:] == ("pronk", "compile")
