"""Words nobody else would say, sent through every route of a real server that is then broken in
every way, and looked for in all that it leaves: logs, files, metrics, processes, other answers.

What proves that the search would find them: with ``--log-content`` it does.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.conftest import ROOT
from tests.running import Running, free_port, wait_until

CANARY = "xylographic-quokka"
SAID = f"{CANARY} rhapsodises"  # what the model is made to say
OURS, OTHERS = f"sk-{CANARY}-ours", f"sk-{CANARY}-others"
NOISE = {"user": CANARY, "metadata": {CANARY: CANARY}, "safety_identifier": CANARY}
USER = [{"role": "user", "content": CANARY}]
SCHEMA = {"type": "object", "properties": {CANARY: {"const": SAID}}, "required": [CANARY]}
TOOL = {
    "type": "function",
    "function": {"name": "look_up", "description": CANARY, "parameters": SCHEMA},
}
SMALL = ["--no-sample", "--threads", "1", "--num-kv-blocks", "24", "--block-size", "64"]
WEIRD = ["--allow-request-chat-template", "--max-model-len", "1024", "--metrics-public"]
WEIRD += ["--access-log"]


@dataclass
class Watched:
    server: Running
    folder: Path  # its working folder, temporary files, home and caches

    def client(self, key: str = OURS) -> httpx.Client:
        headers = {"Authorization": f"Bearer {key}"}
        return httpx.Client(base_url=self.server.url, headers=headers, timeout=60)

    def engine(self) -> psutil.Process:
        found: list[psutil.Process] = []

        def is_there() -> bool:
            with contextlib.suppress(psutil.Error):
                children = psutil.Process(self.server.process.pid).children()
                found[:] = [c for c in children if "service.engine.worker" in c.cmdline()]
            return bool(found)

        wait_until(is_there, "an engine", self.server)
        return found[0]


@contextmanager
def watched(folder: Path, *arguments: str) -> Iterator[Watched]:
    """A server with everything it could write to below ``folder``, and core dumps allowed to it."""
    for name in ("tmp", "home", "cache"):
        (folder / name).mkdir()
    port = free_port()
    command = [sys.executable, "-m", "service.cli", "serve", *SMALL, *WEIRD, *arguments]
    own = {
        "PYTHONPATH": str(ROOT),
        "PRONK_API_KEY": f"{OURS},{OTHERS}",
        "TMPDIR": str(folder / "tmp"),
        "HOME": str(folder / "home"),
        "XDG_CACHE_HOME": str(folder / "cache"),
    }
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PRONK_")}
    with (folder / "log").open("w+b") as log:
        process = subprocess.Popen(
            [*command, "--port", str(port)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=inherited | own,
            cwd=folder,
            preexec_fn=allow_core_dumps,
        )
        server = Running(f"http://127.0.0.1:{port}", process, log)
        try:
            server.wait_ready()
            yield Watched(server, folder)
        finally:
            server.end(signal.SIGKILL)


def allow_core_dumps() -> None:
    hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
    resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short: a Unix socket's path has 108 bytes."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="canary-") as name:
        yield Path(name)


# ---- what is sent

ANSWERED: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": CANARY, "max_tokens": 3, "logprobs": 2, "echo": True, **NOISE}),
    ("/v1/completions", {"prompt": [CANARY] * 2, "max_tokens": 2, "n": 2, "stop": [CANARY, "z"]}),
    ("/v1/completions", {"prompt": CANARY, "max_tokens": 2, "bad_words": [CANARY], "n": 2}),
    ("/v1/completions", {"prompt": CANARY, "cache_salt": CANARY, "prompt_cache_key": CANARY}),
    ("/v1/completions", {"prompt": CANARY, "use_beam_search": True, "n": 2, "max_tokens": 3}),
    ("/v1/chat/completions", {"messages": [{"role": "system", "content": CANARY}, *USER]}),
    ("/v1/chat/completions", {"messages": USER, "chat_template": "{{ messages[0].content }}"}),
    ("/v1/responses", {"input": CANARY, "instructions": CANARY, "max_output_tokens": 16}),
    ("/v1/messages", {"model": "pronk", "max_tokens": 3, "system": CANARY, "messages": USER}),
    ("/v1/messages/count_tokens", {"model": "pronk", "messages": USER}),
    ("/v1/embeddings", {"input": [CANARY, CANARY + "!"], "user": CANARY}),
    ("/v1/score", {"text_1": CANARY, "text_2": [CANARY]}),
    ("/v1/rerank", {"query": CANARY, "documents": [CANARY]}),
    ("/v1/estimate", {"messages": USER}),
    ("/tokenize", {"prompt": CANARY}),
]
ROOM = {"max_tokens": 90}
MADE_TO_SAY: list[tuple[str, dict[str, Any]]] = [
    (
        "/v1/completions",
        {"prompt": "a", "max_tokens": 90, "structured_outputs": {"choice": [SAID]}},
    ),
    ("/v1/completions", {"prompt": "a", "structured_outputs": {"regex": SAID}, **ROOM}),
    (
        "/v1/chat/completions",
        {"messages": USER, "tools": [TOOL], "tool_choice": "required", "max_tokens": 300},
    ),
]
REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": {"text": CANARY}}),
    ("/v1/completions", {"prompt": CANARY, "model": CANARY}),
    ("/v1/completions", {"prompt": CANARY, "temperature": CANARY}),
    ("/v1/completions", {"prompt": f"{CANARY} " * 2000}),
    ("/v1/completions", {"prompt": CANARY, "logit_bias": {CANARY: 1}}),
    ("/v1/completions", {"prompt": CANARY, "structured_outputs": {"regex": f"({CANARY}"}}),
    ("/v1/completions", {"prompt": CANARY, "structured_outputs": {"grammar": f"start: {CANARY}"}}),
    (
        "/v1/completions",
        {"prompt": CANARY, "structured_outputs": {"json": {"title": CANARY, "multipleOf": 999983}}},
    ),
    ("/v1/chat/completions", {"messages": [{"role": CANARY, "content": CANARY}]}),
    ("/v1/chat/completions", {"messages": USER, "tools": [{"type": CANARY}]}),
    ("/v1/chat/completions", {"messages": USER, "chat_template": "{{ " + CANARY + " "}),
    (
        "/v1/chat/completions",
        {"messages": USER, "chat_template": "{{ raise_exception(messages[0].content) }}"},
    ),
    (
        "/v1/chat/completions",
        {"messages": USER, "chat_template": "{{ messages[0].content.nothing.at_all }}"},
    ),
    ("/v1/responses", {"input": [{"type": CANARY, "text": CANARY}]}),
    ("/v1/messages", {"model": "pronk", "max_tokens": CANARY, "messages": USER}),
    ("/v1/embeddings", {"input": {CANARY: CANARY}}),
    ("/detokenize", {"tokens": [CANARY]}),
    (f"/v1/{CANARY}", {"prompt": CANARY}),
]


def ask_everything(client: httpx.Client) -> None:
    for path, body in ANSWERED:
        answer = client.post(path, json={"max_tokens": 4} | body if "chat" in path else body)
        assert answer.status_code == 200, (path, answer.text)
    for path, body in MADE_TO_SAY:
        assert CANARY in client.post(path, json=body).text, "it was made to say so"
        streamed = client.post(path, json=body | {"stream": True}).text
        assert "[DONE]" in streamed
    for path, body in REFUSED:
        answer = client.post(path, json=body)
        assert 400 <= answer.status_code < 500, (path, body, answer.text)
    send_nonsense(client)


def send_nonsense(client: httpx.Client) -> None:
    """What is no request at all."""
    sent = {"Content-Type": "application/json"}
    url = "/v1/completions"
    for body in (f'{{"prompt": "{CANARY}', f'{{"{CANARY}": NaN}}', f'"{CANARY}"', "\ud800"):
        raw = body.encode("utf-8", "surrogatepass")
        assert client.post(url, content=raw, headers=sent).status_code == 400
    wrong = {"Content-Type": f"text/{CANARY}", "X-Note": CANARY, "Cookie": CANARY}
    assert client.post(url, content=CANARY, headers=wrong).status_code == 415
    assert client.get(f"{url}?{CANARY}={CANARY}").status_code == 405
    for header in (f"Bearer {CANARY}", f"Basic {CANARY}", CANARY):
        answer = client.post(url, json={"prompt": CANARY}, headers={"Authorization": header})
        assert answer.status_code == 401
        assert CANARY not in answer.text


def hang_up(client: httpx.Client) -> None:
    for path, body in (
        ("/v1/completions", {"prompt": CANARY, "max_tokens": 500, "ignore_eos": True}),
        ("/v1/chat/completions", {"messages": USER, "max_tokens": 500, "ignore_eos": True}),
    ):
        with client.stream("POST", path, json=body | {"stream": True}) as answer:
            next(answer.iter_lines())


# ---- what breaks


def break_the_engine(own: Watched, number: signal.Signals) -> None:
    """While it works on the canary; its stacks are asked for first, as of a stuck one."""
    body = {"prompt": CANARY, "max_tokens": 900, "ignore_eos": True, "stream": True, "n": 4}
    engine, began = own.engine(), threading.Event()

    def read() -> None:
        with (
            contextlib.suppress(httpx.HTTPError),
            own.client() as client,
            client.stream("POST", "/v1/completions", json=body) as answer,
        ):
            for _ in answer.iter_lines():
                began.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert began.wait(30)
    engine.send_signal(signal.SIGUSR1)
    time.sleep(0.1)
    engine.send_signal(number)
    reader.join(60)
    assert not reader.is_alive()
    wait_until(lambda: not engine.is_running() or engine.status() == "zombie", "its end")
    own.server.wait_ready()


def look_at_processes(own: Watched) -> None:
    """Neither keys nor words in what a process list shows, nor in what the engine inherits."""
    again = {"prompt": "a", "structured_outputs": {"regex": f"{SAID}!"}, **ROOM}
    with own.client() as client:  # one that was ended is started again
        assert client.post("/v1/completions", json=again).status_code == 200
    server = psutil.Process(own.server.process.pid)
    children = server.children(recursive=True)
    assert len(children) >= 2, "the engine, and what tries grammars"
    for process in (server, *children):
        assert not traces(" ".join(process.cmdline()), [])
    for process in children:
        with contextlib.suppress(psutil.AccessDenied):
            assert not traces(json.dumps(process.environ()), [])


def ask_as_another(own: Watched) -> str:
    """All that another client is told, in answers, refusals and pages."""
    with own.client(OTHERS) as client:
        told = [
            client.post("/v1/completions", json={"prompt": "Hello", "max_tokens": 3, "seed": 1}),
            client.post("/v1/completions", json={"prompt": 5}),
            client.post("/v1/chat/completions", json={"messages": []}),
            client.post("/v1/estimate", json={"prompt": "Hello"}),
            *map(client.get, ("/metrics", "/readyz", "/livez", "/version", "/v1/models", "/none")),
            client.get("/openapi.json"),
        ]
    assert sum(answer.status_code == 200 for answer in told) >= 7
    return "\n".join(f"{answer.headers}\n{answer.text}" for answer in told)


# ---- what is left


def traces(text: str | bytes, ids: list[int]) -> set[str]:
    """Of the canary in any writing: itself, encoded, or the tokens it is made of."""
    data = text.encode(errors="replace") if isinstance(text, str) else text
    found = set()
    for word in (CANARY.encode(), SAID.encode()):
        looked_for = [word, word.hex().encode(), word.replace(b"-", b"%2D"), word[::-1]]
        looked_for += [word.decode().encode("utf-16-le"), word.upper()]
        looked_for += [base64.b64encode(b"_" * shift + word)[4:-4] for shift in range(3)]
        found |= {repr(one) for one in looked_for if one in data}
    spellings = [joint.join(map(str, ids)).encode() for joint in (", ", ",", " ")]
    return found | {repr(one) for one in spellings if ids and one in data}


def files_of(folder: Path) -> dict[Path, bytes]:
    found = {}
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            found[path] = path.read_bytes()
    return found


@pytest.mark.parametrize(
    ("level", "style"), [("debug", "text"), pytest.param("info", "json", marks=pytest.mark.slow)]
)
def test_nothing_a_client_or_the_model_said_is_left_anywhere(
    folder: Path, level: str, style: str
) -> None:
    with watched(folder, "--log-level", level, "--log-format", style) as own:
        with own.client() as client:
            ids = client.post("/tokenize", json={"prompt": CANARY}).json()["tokens"]
            ask_everything(client)
            hang_up(client)
        look_at_processes(own)
        for number in (signal.SIGKILL, signal.SIGABRT):
            break_the_engine(own, number)
        with own.client() as client:
            client.post("/v1/completions", json={"prompt": CANARY, "max_tokens": 3})
        assert traces(ask_as_another(own), ids) == set()
        own.server.end(signal.SIGABRT)  # as a crash of the HTTP process itself, words in memory
        wait_until(lambda: not list(folder.rglob("*.sock")), "the engine to end with it")
    left = files_of(folder)
    assert len(ids) >= 4
    log = left[folder / "log"]
    assert b"Current thread" in log, "the stacks that were asked for"
    assert b"restarting it" in log
    assert {str(path): traces(data, ids) for path, data in left.items() if traces(data, ids)} == {}
    assert not [path for path in left if path.name.startswith("core")]


def test_log_content_is_off_said_loudly_and_does_what_it_says(folder: Path) -> None:
    """And the search finds what is there to be found."""
    with watched(folder, "--log-content") as own:
        body = {"prompt": CANARY, "max_tokens": 90, "structured_outputs": {"choice": [SAID]}}
        with own.client() as client:
            assert client.post("/v1/completions", json=body).status_code == 200
        log = own.server.output()
    assert "warning" in log
    assert "--log-content is on: prompts and answers are written to the log" in log
    assert log.count(CANARY) >= 2
    assert traces(log, [])
    assert "sk-" not in log, "keys never"
