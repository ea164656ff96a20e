"""The import rules, held: who may know whom, and who never loads torch."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted([*(ROOT / "model").rglob("*.py"), *(ROOT / "service").rglob("*.py")])
INTEGERS_ONLY = ("sequence", "blocks", "scheduler")
TORCH_FREE = (
    "model",
    "model.config",
    "model.tokenizer",
    "model.detokenizer",
    "model.chat_template",
)


def imports(path: Path) -> Iterator[str]:
    """Every module a file names in an import, also inside functions; not under TYPE_CHECKING."""
    tree = ast.parse(path.read_text())
    hidden = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module


def offenders(folder: str, *forbidden: str) -> list[str]:
    return [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in SOURCES
        if path.is_relative_to(ROOT / folder)
        for name in imports(path)
        if any(name == word or name.startswith(word + ".") for word in forbidden)
    ]


def test_the_scan_sees_imports() -> None:
    assert offenders("service", "msgspec"), "a scan that finds nothing proves nothing"


def test_model_has_never_heard_of_a_request() -> None:
    assert not offenders("model", "service", "fastapi", "pydantic", "asyncio", "starlette")


def test_engine_knows_nothing_of_the_api() -> None:
    assert not offenders("service/engine", "service.api", "fastapi", "starlette", "uvicorn")


def test_the_ledger_is_the_standard_library_and_knows_nobody() -> None:
    allowed = {"service.ledger", "rich", "__future__", *sys.stdlib_module_names}
    found = {
        name
        for path in SOURCES
        if path.is_relative_to(ROOT / "service/ledger")
        for name in imports(path)
    }
    assert {n for n in found if not any(n == a or n.startswith(f"{a}.") for a in allowed)} == set()


def test_api_touches_no_tensor() -> None:
    assert not offenders("service/api", "torch", "model.llama", "model.sampler", "model.kv_cache")


def test_only_the_runner_touches_tensors_in_the_engine() -> None:
    found = offenders("service/engine", "torch")
    allowed = ("service/engine/runner.py", "service/engine/worker.py", "service/engine/loading.py")
    assert [line for line in found if not line.startswith(allowed)] == []


@pytest.mark.parametrize("name", INTEGERS_ONLY)
def test_scheduling_is_integers_and_the_standard_library(name: str) -> None:
    path = ROOT / "service" / "engine" / f"{name}.py"
    standard = {"service", "__future__", *sys.stdlib_module_names}
    assert {module.split(".")[0] for module in imports(path)} <= standard


HTTP_PROCESS = ("service.api.app", "service.serve", "service.cli")
LOAD_GENERATOR = ("service.bench.serve", "service.bench.plot", "service.bench.offline")


@pytest.mark.parametrize("module", [*TORCH_FREE, *HTTP_PROCESS, *LOAD_GENERATOR])
def test_the_http_process_loads_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_nothing_that_runs_code_reads_what_others_wrote() -> None:
    """No pickle on a socket; in a .pth file a reader of five names, and torch's strict one."""
    readers = ("pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib")
    assert offenders("service", *readers) == []
    assert sorted(offenders("model", *readers)) == [
        "model/checkpoint/meta.py imports pickle",
        "model/checkpoint/meta_config.py imports pickle",
    ]
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                assert name not in ("eval", "exec", "os.system"), path
                assert name != "torch.load" or "weights_only=True" in ast.unparse(node), path


def test_no_request_can_make_the_server_fetch_anything() -> None:
    clients = ("httpx", "requests", "urllib.request", "urllib3", "aiohttp", "huggingface_hub")
    assert offenders("service/api", *clients) == []
    assert offenders("service/engine", *clients) == []


def test_no_file_is_named_for_what_it_is_not() -> None:
    vague = {"utils.py", "common.py", "helpers.py", "base.py", "misc.py"}
    assert [path for path in SOURCES if path.name in vague] == []


# A GPU machine may have no more than torch, triton, numpy, safetensors and pytest.
ABSENT = (
    *("fastapi", "pydantic", "pydantic_settings", "msgspec", "httpx", "uvicorn", "typer", "rich"),
    *("tokenizers", "sentencepiece", "gguf", "huggingface_hub", "transformers"),
)
BARE = """
import sys
sys.modules |= dict.fromkeys(sys.argv[1:])
import pytest
sys.exit(pytest.main(["-p", "no:cacheprovider", "--collect-only", "-q", "tests/gpu"]))
"""


def test_gpu_tests_need_no_more_than_a_bare_machine_has() -> None:
    command = [sys.executable, "-c", BARE, *ABSENT]
    without = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    run = subprocess.run(command, cwd=ROOT, env=without, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3_000:] + run.stderr[-2_000:]
