"""What the documents say, held against the code: tables, trees, links, flags, commands, answers."""

from __future__ import annotations

import ast
import re
import subprocess
from functools import cache
from pathlib import Path

import pytest
from typer.main import get_command

from docs import first_call
from docs.generate import FOLDER, PAGES
from service.cli import app
from service.settings import ENVIRONMENT_PREFIX, Settings

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
TREES = ("README.md", "model/README.md", "service/README.md")


def tracked(folder: Path = ROOT) -> list[Path]:
    """The repository's files below a folder, relative to it; none outside of a git checkout."""
    listed = subprocess.run(
        ["git", "ls-files"], cwd=folder, capture_output=True, text=True, check=False
    )
    return [Path(line) for line in listed.stdout.splitlines() if (folder / line).exists()]


TRACKED = tracked()
DOCUMENTS = [path for path in TRACKED if path.suffix == ".md"] or [Path(tree) for tree in TREES]
in_a_checkout = pytest.mark.skipif(
    not TRACKED, reason="which files belong to the repository, only a git checkout tells"
)
# docker's, pip's and cmake's
FOREIGN_FLAGS = {"--build", "--build-arg", "--no-binary", "--no-deps", "--target"}
ARGUMENT = re.compile(r"""add_argument\(\s*["'](--[\w-]+)""")
SETTING_FLAGS = {f"--{name.replace('_', '-')}" for name in Settings.model_fields}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, content) of each fenced block."""
    return [(found[1], found[2]) for found in FENCE.finditer(text)]


def tree_of(document: str) -> list[str]:
    """The paths a document's tree names, below its folder."""
    text = (ROOT / document).read_text()
    tree = next(content for language, content in blocks(text) if language == "text")
    paths, folders = [], [""]
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 4
        names = re.split(r"\s{2,}", line.strip())[0].split()
        folders = folders[: depth + 1]
        paths += [folders[-1] + name for name in names]
        folders.append(folders[-1] + names[-1])
    return paths


def source_files(folder: Path) -> set[str]:
    """What must stand in a folder's tree: its sources and its folders, once each."""
    paths = tracked(folder)
    own = {path.name for path in paths if len(path.parts) == 1 and path.suffix in {".py", ".c"}}
    return (own - {"__init__.py"}) | {f"{path.parts[0]}/" for path in paths if len(path.parts) > 1}


@pytest.mark.parametrize("name", PAGES)
def test_generated_pages_are_what_the_code_says(name: str) -> None:
    assert (FOLDER / name).read_text() == PAGES[name](), "run: python -m docs.generate"


def test_readme_begins_with_exactly_two_commands() -> None:
    language, content = blocks(README)[0]
    commands = content.splitlines()
    assert language == "sh"
    assert len(commands) == 2
    assert commands[0].endswith(".venv/bin/pronk serve")
    assert commands[1].endswith(".venv/bin/python -m pytest")


@pytest.mark.parametrize("document", TREES)
def test_everything_a_tree_names_exists(document: str) -> None:
    folder = (ROOT / document).parent
    missing = [path for path in tree_of(document) if not (folder / path).exists()]
    assert missing == []


@in_a_checkout
def test_the_readme_tree_names_every_top_level_file_and_folder() -> None:
    named = {Path(path).parts[0] for path in tree_of("README.md")}
    top = {path.parts[0] for path in TRACKED}
    assert top - named == {".gitignore", ".dockerignore"}


@in_a_checkout
@pytest.mark.parametrize("document", ["model/README.md", "service/README.md"])
def test_a_folder_s_tree_names_every_source_file(document: str) -> None:
    named = set(tree_of(document))
    folder = (ROOT / document).parent
    inner = [path for path in named if path.endswith("/") and path.count("/") == 1]
    wanted = source_files(folder)
    for name in inner:
        below = {path for path in named if path.startswith(name) and path != name}
        if below:  # a tree that opens a folder names all of it
            wanted |= {name + file for file in source_files(folder / name)}
    assert wanted - named == set()


@pytest.mark.parametrize("path", DOCUMENTS, ids=str)
def test_relative_links_resolve(path: Path) -> None:
    text = FENCE.sub("", (ROOT / path).read_text())
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|srcset)="([^"]+)"', text)
    local = [target for target in targets if not re.match(r"[a-z]+:|#", target)]
    broken = [
        target for target in local if not ((ROOT / path).parent / target.partition("#")[0]).exists()
    ]
    assert broken == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=str)
def test_flags_and_variables_exist(path: Path) -> None:
    text = (ROOT / path).read_text()
    known = SETTING_FLAGS | FOREIGN_FLAGS | command_flags() | script_flags() | {"--help"}
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+[a-z]", text))
    # a setting that is on or off has a second flag that no source spells: --no-NAME
    known |= {flag.replace("--", "--no-", 1) for flag in SETTING_FLAGS}
    assert flags - known == set()
    variables = set(re.findall(rf"\b{ENVIRONMENT_PREFIX}[A-Z_]+[A-Z]", text))
    settings = {ENVIRONMENT_PREFIX + name.upper() for name in Settings.model_fields}
    assert variables - settings - {"PRONK_NAME"} == set()


RELIABILITY = (ROOT / "docs" / "reliability.md").read_text()
CITED = re.compile(r"\[`(test_\w+)`\]\(\.\./(tests/[\w/]+\.py)\)")


@pytest.mark.parametrize(("name", "path"), CITED.findall(RELIABILITY))
def test_every_test_that_is_to_prove_a_promise_exists(name: str, path: str) -> None:
    assert re.search(rf"^(async )?def {name}\(", (ROOT / path).read_text(), re.MULTILINE)


def test_every_test_the_security_page_names_exists() -> None:
    cited = re.findall(r"`([\w/]+\.py)(?:::(\w+))?`", (ROOT / "SECURITY.md").read_text())
    assert len(cited) > 20
    for path, name in cited:
        assert f"def {name}" in (ROOT / "tests" / path).read_text(), path


def markers_of(name: str, path: str) -> set[str]:
    """Those that keep a test, or its whole file, out of a plain ``pytest``."""
    tree = ast.parse((ROOT / path).read_text())
    marks = [
        decorator
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name
        for decorator in node.decorator_list
        if "parametrize" not in ast.unparse(decorator)
    ]
    marks += [node.value for node in tree.body if isinstance(node, ast.Assign)
              and ast.unparse(node.targets[0]) == "pytestmark"]  # fmt: skip
    return set(re.findall(r"mark\.(slow|soak|container|gpu)", " ".join(map(ast.unparse, marks))))


@pytest.mark.parametrize(
    "row",
    [line for line in RELIABILITY.splitlines() if CITED.search(line)],
    ids=lambda row: row[:40],
)
def test_a_promise_says_which_of_its_tests_a_plain_pytest_leaves_out(row: str) -> None:
    left_out = {marker for name, path in CITED.findall(row) for marker in markers_of(name, path)}
    assert left_out == set(re.findall(r"`-m (\w+)`", row))


def test_every_promise_has_a_proof() -> None:
    rows = [line.split(" | ") for line in RELIABILITY.splitlines() if line.startswith("| ")]
    start = [row[0] for row in rows].index("| promise")
    promises = [row for row in rows[start:] if len(row) == 3 and row[0] != "| promise"]
    assert len(promises) > 20
    for promise, proof, _ in promises:
        scripts = re.findall(r"python -m (tests\.[\w.]+)", proof)
        assert CITED.search(proof) or scripts, promise
        for script in scripts:
            assert (ROOT / f"{script.replace('.', '/')}.py").is_file()


def command_flags() -> set[str]:
    """Of ``pronk chat`` and the other commands typer knows, those within commands too."""
    found, commands = set(), [get_command(app)]
    while commands:
        command = commands.pop()
        found |= {
            option for item in command.params for option in [*item.opts, *item.secondary_opts]
        }
        commands += getattr(command, "commands", {}).values()
    return found


@cache
def script_flags() -> set[str]:
    """Of the scripts that stand beside pronk: training, benchmarks."""
    scripts = [path for part in ("model", "tests") for path in (ROOT / part).rglob("*.py")]
    return {flag for path in scripts for flag in ARGUMENT.findall(path.read_text())}


def keys(value: object) -> object:
    """The shape of an answer: keys all the way down, no values."""
    if isinstance(value, dict):
        return {key: keys(inner) for key, inner in value.items()}
    return [keys(inner) for inner in value] if isinstance(value, list) else None


def test_the_readme_s_first_call_answers_in_the_shape_it_shows() -> None:
    """The text depends on the bundled weights and the processor, so only its shape is held."""
    assert keys(first_call.call(README)) == keys(first_call.shown(README))
