"""A served fake engine and the clients of ``.clients/``, each run as a script of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from service.api.app import create_app
from service.registry import ModelRegistry
from service.settings import Settings
from tests.api.fakes import FakeEngine, served
from tests.api.live import listening

FOLDER = Path(__file__).resolve().parent
CLIENTS = Path(os.environ.get("TEST_CLIENTS_DIR", FOLDER.parents[1] / ".clients"))
KEY = "secret-key"


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def url(engine: FakeEngine) -> Iterator[str]:
    model = served(engine)
    model.max_model_len = (
        4000  # these clients ask for 256 tokens unasked and put schemas in prompts
    )
    app = create_app(Settings(api_key=[KEY]), ModelRegistry([model]))
    with listening(app) as found:
        yield f"{found}/v1"


Run = Callable[..., Any]


@pytest.fixture
def run_python(url: str) -> Run:
    """``run_python(script, package)``: the JSON it prints last; skips without the package."""

    def run(script: str, package: str, *arguments: str) -> Any:
        _need_clients()
        python = CLIENTS / "bin" / "python"
        found = subprocess.run(
            [python, "-c", f"import importlib.util as u; exit(u.find_spec({package!r}) is None)"],
            check=False,
        )
        if found.returncode:
            pytest.skip(f"{package} is not installed: tests/clients/install")
        return _last_json([str(python), str(FOLDER / script), url, *arguments])

    return run


@pytest.fixture
def run_node(url: str) -> Run:
    def run(script: str) -> Any:
        _need_clients()
        modules = CLIENTS / "node" / "node_modules"
        if shutil.which("node") is None or not (modules / "openai").exists():
            pytest.skip("node or its openai package is not installed: tests/clients/install")
        place = CLIENTS / "node" / script  # imports are looked for beside the script
        shutil.copyfile(FOLDER / script, place)
        return _last_json(["node", str(place), url])

    return run


def _need_clients() -> None:
    if not (CLIENTS / "complete").exists():
        pytest.skip("no clients are installed, or not all of them: tests/clients/install")


def _last_json(command: list[str]) -> Any:
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment = kept | {
        "OPENAI_API_KEY": KEY,
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "LANGCHAIN_TRACING_V2": "false",
    }
    ended = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert ended.returncode == 0, ended.stderr[-3000:] + ended.stdout[-1000:]
    return json.loads(ended.stdout.strip().splitlines()[-1])
