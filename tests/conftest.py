"""Fixtures every part of the suite shares."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Real checkpoints and tokenizers kept outside the repository; skips where they are missing."""
    folder = Path(os.environ.get("TEST_SHARED_DIR", ROOT.parent / "shared"))
    if not (folder / "models").is_dir():
        pytest.skip(
            "real model files are not here: set TEST_SHARED_DIR to the folder that holds models/"
        )
    return folder
