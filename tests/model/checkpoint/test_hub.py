"""Hub ids, against a small hub of our own on the loopback address."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from model.checkpoint import CheckpointError
from model.checkpoint.hub import resolve, select

COMMIT = "c0ffee" * 6 + "c0ff"
FILES = {
    "config.json": b"{}",
    "model-00001-of-00002.safetensors": b"first",
    "model-00002-of-00002.safetensors": b"second",
    "model.safetensors.index.json": b"{ }",
    "tokenizer.json": b"{  }",
    "pytorch_model.bin": b"pickled",
    "modeling_own.py": b"raise SystemExit",
    "consolidated.safetensors": b"the same again",
    "original/consolidated.00.pth": b"the same again",
    "README.md": b"words",
}


class SmallHub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's API as downloading a snapshot takes."""

    served: list[str] = []

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0].removeprefix("/api/models/").strip("/")
        if not path.startswith("herd/llama"):
            code, message = (401, "RepoNotFound") if "gated" not in path else (403, "GatedRepo")
            self.answer(b"", code, {"X-Error-Code": message})
        elif "/resolve/" in path:
            name = path.split(f"/resolve/{COMMIT}/")[1]
            if self.command == "GET":
                SmallHub.served.append(name)
            etag = {"ETag": f'"{hashlib.sha1(FILES[name]).hexdigest()}"', "X-Repo-Commit": COMMIT}
            self.answer(FILES[name], 200, etag)
        elif "/revision/" in path and not path.endswith(("main", COMMIT)):
            self.answer(b"", 404, {"X-Error-Code": "RevisionNotFound"})
        else:
            is_tree = "/tree/" in path
            self.answer(json.dumps(TREE if is_tree else INFO).encode(), 200, {})

    def answer(self, body: bytes, code: int, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        pass


INFO = {"id": "herd/llama", "sha": COMMIT, "siblings": [{"rfilename": name} for name in FILES]}
TREE = [
    {
        "type": "file",
        "path": name,
        "size": len(content),
        "oid": hashlib.sha1(content).hexdigest(),
    }
    for name, content in FILES.items()
]


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), SmallHub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def resolved(model: str, endpoint: str, home: Path, **options: Any) -> subprocess.CompletedProcess:
    """``resolve`` in a process of its own: the library reads its settings when imported."""
    code = (
        "import json, sys\n"
        "from model.checkpoint import CheckpointError\n"
        "from model.checkpoint.hub import resolve\n"
        "try:\n"
        "    print(resolve(sys.argv[1], **json.loads(sys.argv[2])))\n"
        "except CheckpointError as error:\n"
        "    sys.exit(str(error))\n"
    )
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
    }
    arguments = [sys.executable, "-c", code, model, json.dumps(options)]
    return subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=60)


def test_download_fetches_what_serves_and_nothing_that_runs(endpoint: str, tmp_path: Path):
    SmallHub.served.clear()
    done = resolved("herd/llama", endpoint, tmp_path / "home", download_dir=str(tmp_path / "kept"))
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip())
    assert folder.is_relative_to(tmp_path / "kept")
    wanted = {"config.json", "tokenizer.json", "model.safetensors.index.json"}
    wanted |= {name for name in FILES if name.startswith("model-0")}
    assert {file.name for file in folder.iterdir()} == wanted == set(SmallHub.served)


def test_offline_takes_the_earlier_download_and_asks_nobody(endpoint: str, tmp_path: Path):
    refused = resolved("herd/llama", endpoint, tmp_path, offline=True)
    assert refused.returncode != 0
    assert "downloading is switched off" in refused.stderr
    online = resolved("herd/llama", endpoint, tmp_path)
    assert online.returncode == 0, online.stderr
    SmallHub.served.clear()
    nowhere = "http://127.0.0.1:9"
    assert resolved("herd/llama", nowhere, tmp_path, offline=True).stdout == online.stdout
    unreachable = resolved("herd/llama", nowhere, tmp_path)
    assert unreachable.stdout == online.stdout
    assert not SmallHub.served
    other = resolved("herd/other", nowhere, tmp_path)
    assert "cannot download herd/other: ConnectError" in other.stderr.strip()


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("herd/llama", {"revision": "v9"}, "herd/llama has no revision 'v9'"),
        ("herd-x/none", {}, "herd-x/none is neither a local path nor a model on the hub"),
        ("gated/llama", {}, "gated/llama is gated: accept its terms"),
        ("herd/llama:Q4_0", {}, "herd/llama on the hub holds no GGUF files"),
    ],
)
def test_refusals_of_the_hub_are_told_in_one_line(
    model: str, options: dict[str, Any], message: str, endpoint: str, tmp_path: Path
):
    done = resolved(model, endpoint, tmp_path, **options)
    assert done.returncode != 0
    assert message in done.stderr
    assert done.stderr.strip().count("\n") == 0


def test_local_path_comes_back_absolute_and_nothing_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "herd" / "llama").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("herd/llama") == tmp_path / "herd" / "llama"


@pytest.mark.parametrize("model", ["./none", "/none", "none", "a/b/c", "herd/none.gguf", "~/none"])
def test_path_that_does_not_exist_and_is_no_hub_id_is_refused(model: str):
    with pytest.raises(CheckpointError, match="no such file or folder"):
        resolve(model)


QUANTS = ["m-Q4_K_M.gguf", "m-Q4_K_S.gguf", "m-F16.gguf", "m-BF16.gguf", "mmproj-F16.gguf"]


@pytest.mark.parametrize(
    ("variant", "name"), [("q4_k_m", QUANTS[0]), ("F16", QUANTS[2]), ("BF16", QUANTS[3])]
)
def test_variant_picks_one_gguf_file(variant: str, name: str):
    selection = select(QUANTS, "herd/llama", variant)
    assert selection.files == (name,)
    assert selection.checkpoint == name


@pytest.mark.parametrize("variant", [None, "Q4_K", "Q8_0"])
def test_unclear_variant_lists_the_choice(variant: str | None):
    with pytest.raises(CheckpointError, match=r"herd/llama:VARIANT to pick one of .*Q4_K_M"):
        select(QUANTS, "herd/llama", variant)


def test_all_parts_of_a_split_gguf_are_fetched():
    parts = [f"Q8_0/m-Q8_0-0000{number}-of-00002.gguf" for number in (1, 2)]
    selection = select([*parts, "m-F16.gguf"], "herd/llama", "Q8_0")
    assert selection.files == tuple(parts)
    assert selection.checkpoint == parts[0]


def test_meta_shards_are_taken_where_there_is_nothing_else():
    names = [f"original/{n}" for n in ("consolidated.00.pth", "params.json", "tokenizer.model")]
    selection = select([*names, "README.md"], "herd/llama", None)
    assert set(selection.files) == set(names)
    assert selection.checkpoint == "original"
