"""``pronk chat``: a conversation in the terminal, over the same HTTP API every client uses."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from rich.console import Console

HELP = "Empty line or /quit ends, /new forgets the conversation, Ctrl-C stops an answer."
START_TIMEOUT = 600.0  # seconds a large checkpoint may take to load
HOPELESS = (401, 403, 404)  # no other line will be answered either


class ChatProblem(RuntimeError):
    """The chat cannot go on; the text says why in one line."""


class AnswerFailed(Exception):
    """This answer cannot; the conversation so far is as it was."""


@dataclass(frozen=True)
class ChatSettings:
    model: str | None
    url: str | None
    api_key: str = field(repr=False)
    system: str | None
    temperature: float | None
    max_tokens: int | None


def converse(settings: ChatSettings) -> None:
    """Read lines from the terminal and stream answers until the input ends."""
    if settings.model and settings.url:
        raise ChatProblem("give a model or --url, not both")
    console = Console(highlight=False)
    with _connection(settings, console) as client:
        _wait_until_ready(client, console)
        console.print(HELP, style="dim")
        _talk(client, settings, console)


@contextmanager
def _connection(settings: ChatSettings, console: Console) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {settings.api_key}"} if settings.api_key else {}
    timeout = httpx.Timeout(10.0, read=None)
    if settings.url:
        with httpx.Client(base_url=settings.url, headers=headers, timeout=timeout) as client:
            yield client
        return
    with tempfile.TemporaryDirectory(prefix="pronk-chat-") as folder:
        socket = Path(folder) / "http.sock"
        with _private_server(settings.model, socket) as process:
            transport = httpx.HTTPTransport(uds=str(socket))
            with httpx.Client(
                transport=transport, base_url="http://pronk", headers=headers, timeout=timeout
            ) as client:
                _wait_for_listener(process, socket)
                yield client


@contextmanager
def _private_server(model: str | None, socket: Path) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "service.cli", "serve", *([model] if model else [])]
    command += ["--uds", str(socket), "--no-sample", "--log-level", "warning"]
    command += ["--ledger", "none"]  # nobody is charged for a private chat
    process = subprocess.Popen(command, start_new_session=True)  # Ctrl-C is the chat's alone
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_for_listener(process: subprocess.Popen[bytes], socket: Path) -> None:
    while not socket.exists():
        if process.poll() is not None:
            raise ChatProblem("the server did not start; its message stands above")
        time.sleep(0.05)


def _wait_until_ready(client: httpx.Client, console: Console) -> None:
    end = time.monotonic() + START_TIMEOUT
    with console.status("starting") as status:
        while time.monotonic() < end:
            try:
                answer = client.get("/readyz")
            except httpx.TransportError as error:
                raise ChatProblem(f"no server answers: {type(error).__name__}") from None
            if answer.status_code == 200:
                return
            state = answer.json()
            if state.get("stage") == "failed":
                raise ChatProblem(f"the model could not be loaded: {state.get('reason')}")
            status.update(f"{state.get('stage')} {100 * state.get('progress', 0):.0f} %")
            time.sleep(0.1)
    raise ChatProblem("the server did not become ready in time")


def _talk(client: httpx.Client, settings: ChatSettings, console: Console) -> None:
    opening = [{"role": "system", "content": settings.system}] if settings.system else []
    messages = list(opening)
    while line := _read_line(console):
        if line == "/quit":
            return
        if line == "/new":
            messages = list(opening)
            continue
        asked = [*messages, {"role": "user", "content": line}]
        try:
            answer = _print_answer(client, settings, asked, console)
        except AnswerFailed as failure:
            console.print(f"\npronk: {failure}", style="red", markup=False)
        else:
            messages = [*asked, {"role": "assistant", "content": answer}]


def _read_line(console: Console) -> str:
    try:
        return console.input("[bold]you[/bold]  ").strip()
    except (EOFError, KeyboardInterrupt):
        console.print()
        return ""


def _print_answer(
    client: httpx.Client,
    settings: ChatSettings,
    messages: list[dict[str, str]],
    console: Console,
) -> str:
    body: dict[str, object] = {"messages": messages, "stream": True}
    if settings.temperature is not None:
        body["temperature"] = settings.temperature
    if settings.max_tokens is not None:
        body["max_tokens"] = settings.max_tokens
    pieces: list[str] = []
    console.print("[bold]model[/bold]  ", end="")
    try:
        for piece in _stream(client, body):
            pieces.append(piece)
            console.print(piece, end="", markup=False, soft_wrap=True)
    except KeyboardInterrupt:
        console.print(" (stopped)", style="dim", end="")
    console.print()
    return "".join(pieces)


def _stream(client: httpx.Client, body: dict[str, object]) -> Iterator[str]:
    """Text pieces of one streamed answer. Raises a refusal, in the server's words."""
    try:
        with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            if answer.status_code != 200:
                answer.read()
                problem = ChatProblem if answer.status_code in HOPELESS else AnswerFailed
                raise problem(answer.json()["error"]["message"])
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    yield _piece(json.loads(line[6:]))
    except httpx.TransportError as error:
        raise ChatProblem(f"the connection broke: {type(error).__name__}") from None


def _piece(event: dict[str, object]) -> str:
    if isinstance(error := event.get("error"), dict):
        raise AnswerFailed(str(error.get("message")))
    choices = event.get("choices")
    if not isinstance(choices, list) or not choices:
        return ""
    return str(choices[0].get("delta", {}).get("content") or "")
