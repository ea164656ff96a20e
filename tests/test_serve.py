"""The server's life seen from outside: starts that fail in one line, drains, ends, and orphans."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from model.bundled import bundled_model_path
from tests.running import ROOT, Running, serving, wait_until

STREAM = {"prompt": "Once upon a time", "stream": True, "ignore_eos": True}


class Reader(threading.Thread):
    """Reads one stream beside the test; made when its first line has come."""

    def __init__(self, url: str, body: dict[str, object]) -> None:
        super().__init__()
        self.url, self.body = url, body
        self.events: list[str] = []
        self.began = threading.Event()
        self.start()
        assert self.began.wait(30)

    def run(self) -> None:
        url = f"{self.url}/v1/completions"
        with httpx.stream("POST", url, json=self.body, timeout=60) as answer:
            for line in answer.iter_lines():
                self.began.set()
                if line.startswith("data: "):
                    self.events.append(line)

    def assert_ended_with_one_error(self) -> None:
        self.join(30)
        assert self.events[-1] == "data: [DONE]"
        assert '"error"' in self.events[-2]
        assert sum('"error"' in event for event in self.events) == 1


def pronk(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PRONK_")}
    environment["PRONK_LEDGER"] = "none"
    return subprocess.run(
        [sys.executable, "-m", "service.cli", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving() as running:
        yield running


# ---- starts


def test_the_listener_is_up_before_the_model_is() -> None:
    with serving("--no-sample", ready=False) as running:
        wait_until(lambda: status(running, "/livez") == 200, "the listener", running)
        first = httpx.get(f"{running.url}/readyz", timeout=5)
        assert first.status_code in (200, 503)
        if first.status_code == 503:
            assert first.json()["stage"] in ("starting", "loading", "warming_up")
            refused = httpx.post(f"{running.url}/v1/completions", json={"prompt": "a"}, timeout=5)
            assert refused.status_code == 503
            assert int(refused.headers["retry-after"]) >= 1
        running.wait_ready()


def test_the_banner_and_a_sample_are_printed(server: Running) -> None:
    wait_until(lambda: "Once upon a time" in server.output(), "the sample", server)
    text = server.output()
    assert server.url in text
    assert "KV cache" in text
    assert "bfloat16" in text or "float32" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["/does/not/exist"], "no model at"),
        (["--port", "99999"], "port"),
        (["--host", "999.1.1.1"], "cannot listen"),
        (["--bogus"], "--bogus"),
    ],
)
def test_a_start_that_cannot_be_says_so_in_a_line(arguments: list[str], words: str) -> None:
    done = pronk("serve", *arguments)
    assert done.returncode != 0
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_quantized_weights_serve_and_the_banner_says_so() -> None:
    with serving("--quantization", "int4", "--no-sample") as server:
        body = {"prompt": "Once upon a time", "max_tokens": 16, "temperature": 0}
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
        assert answer.status_code == 200
        assert len(answer.json()["choices"][0]["text"].split()) > 5
        assert "int4 weights, groups of 32; head: int8 weights, groups of 64" in server.output()


def test_fp8_on_a_processor_ends_the_server_with_the_reason() -> None:
    done = pronk("serve", "--quantization", "fp8", "--device", "cpu", "--port", "0")
    assert done.returncode == 1
    assert "use int8 or int4 on a CPU" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_taken_port_is_said_at_once(server: Running) -> None:
    done = pronk("serve", "--port", server.url.rpartition(":")[2])
    assert done.returncode == 1
    assert "in use" in done.stderr


def test_a_broken_checkpoint_ends_the_server_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["MixtralForCausalLM"]}))
    (tmp_path / "model.safetensors").write_bytes(b"")
    done = pronk("serve", str(tmp_path), "--port", "0")
    assert done.returncode == 1
    assert "Mixtral" in done.stderr or "safetensors" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_hostile_tokenizer_beside_good_weights_ends_the_server_with_the_reason(
    tmp_path: Path,
) -> None:
    """It is the HTTP process that reads it; that one must not stay up and never get ready."""
    for file in bundled_model_path().iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    odd = {"additional_special_tokens": True, "eos_token": "\x1b[2J"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(odd))
    done = pronk("serve", str(tmp_path), "--port", "0", "--no-sample")
    assert done.returncode == 1
    assert "the additional special tokens are True" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["fp8", "int8"])
def test_a_quantized_cache_writes_sensible_text_and_says_what_it_is(name: str) -> None:
    with serving("--no-sample", "--kv-cache-dtype", name) as running:
        body = {"prompt": "Once upon a time", "max_tokens": 40, "temperature": 0}
        answers = [
            httpx.post(f"{running.url}/v1/completions", json=body, timeout=60).json()
            for _ in range(2)
        ]
        metrics = httpx.get(f"{running.url}/metrics", timeout=5).text
        assert f"tokens in {name};" in running.output()
    texts = [answer["choices"][0]["text"] for answer in answers]
    assert texts[0] == texts[1]
    words = texts[0].split()
    assert len(words) > 20
    assert len(set(words)) > 12, "it repeats itself"
    assert sum(word.isascii() for word in words) == len(words)
    assert f'cache_dtype="{name}"' in metrics


# ---- ends


def test_sigterm_drains_streams_finish_and_new_work_is_refused() -> None:
    with serving("--no-sample") as running:
        body = STREAM | {"max_tokens": 900}
        with httpx.stream("POST", f"{running.url}/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            running.process.send_signal(signal.SIGTERM)
            wait_until(lambda: status(running, "/readyz") == 503, "readiness to turn", running)
            refused = httpx.post(f"{running.url}/v1/completions", json={"prompt": "a"}, timeout=5)
            events = [line for line in lines if line.startswith("data: ")]
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "draining"
        assert "retry-after" in refused.headers
        assert events[-1] == "data: [DONE]"
        assert json.loads(events[-2][6:])["choices"][0]["finish_reason"] == "length"
        assert running.process.wait(30) == 0


def test_a_stream_past_the_drain_timeout_gets_its_one_terminal_event() -> None:
    with serving("--no-sample", "--drain-timeout", "0.2") as running:
        reader = Reader(running.url, STREAM | {"max_tokens": 1000, "n": 32})
        assert running.end(timeout=20) == 0
        reader.assert_ended_with_one_error()


def test_a_second_signal_ends_at_once() -> None:
    with serving("--no-sample", "--drain-delay", "60") as running:
        running.process.send_signal(signal.SIGTERM)
        running.process.send_signal(signal.SIGTERM)  # the same one, sent twice by a wrapper
        wait_until(lambda: status(running, "/readyz") == 503, "readiness to turn", running)
        time.sleep(0.3)
        assert running.process.poll() is None
        with ThreadPoolExecutor() as pool:
            body = {"prompt": "Once", "max_tokens": 900, "n": 8, "ignore_eos": True}
            url = f"{running.url}/v1/completions"
            whole = pool.submit(httpx.post, url, json=body, timeout=30)
            wait_until(lambda: running_requests(running) > 0, "it to run", running)
            assert running.end(timeout=10) != 0
        assert whole.result().status_code == 500
        assert whole.result().json()["error"]["code"] == "engine_failure"


def running_requests(running: Running) -> float:
    metrics = httpx.get(f"{running.url}/metrics", timeout=5).text
    lines = [line for line in metrics.splitlines() if line.startswith("vllm:num_requests_running{")]
    return sum(float(line.split()[-1]) for line in lines)


def test_a_killed_engine_is_back_and_every_client_is_answered(server: Running) -> None:
    reader = Reader(server.url, STREAM | {"max_tokens": 1000, "n": 16})
    for engine in psutil.Process(server.process.pid).children():
        engine.kill()
    reader.assert_ended_with_one_error()
    server.wait_ready()
    body = {"prompt": "Once", "max_tokens": 3}
    assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=30).status_code == 200


def test_it_serves_on_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "http.sock"
    left_behind = socket.socket(socket.AF_UNIX)
    left_behind.bind(str(path))  # by a server that was killed
    left_behind.close()
    with serving("--no-sample", "--uds", str(path), ready=False) as running:
        wait_until(lambda: accepts(path), "the socket to answer", running)
        transport = httpx.HTTPTransport(uds=str(path))
        with httpx.Client(transport=transport, base_url="http://pronk") as client:
            assert client.get("/livez", timeout=5).status_code == 200


def accepts(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


def num_generated(running: Running) -> float:
    lines = httpx.get(f"{running.url}/metrics", timeout=5).text.splitlines()
    values = [line for line in lines if line.startswith("vllm:generation_tokens_total")]
    return sum(float(line.rpartition(" ")[2]) for line in values)


def status(running: Running, path: str) -> int:
    try:
        return httpx.get(f"{running.url}{path}", timeout=5).status_code
    except httpx.TransportError:
        return 0


# ---- the other commands


def test_doctor_reports() -> None:
    done = pronk("doctor")
    assert done.returncode == 0
    assert "torch" in done.stdout


def test_help_names_every_setting() -> None:
    from service.settings import Settings

    text = pronk("serve", "--help").stdout
    flags = [name.replace("_", "-") for name in Settings.model_fields if name != "model"]
    assert [flag for flag in flags if f"--{flag}" not in text] == []


def test_chat_answers_in_the_terminal() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "service.cli", "chat", "--max-tokens", "12"],
        input="Hello\n/quit\n",
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "model" in done.stdout


def test_sigterm_lets_a_beam_search_finish() -> None:
    """Its rounds are requests of their own; between two of them the engine has nothing to do."""
    with serving("--no-sample") as running:
        answers: list[httpx.Response] = []

        def search() -> None:
            body = {"prompt": "Once", "n": 3, "use_beam_search": True, "max_tokens": 120}
            body |= {"ignore_eos": True}
            answers.append(httpx.post(f"{running.url}/v1/completions", json=body, timeout=60))

        thread = threading.Thread(target=search)
        thread.start()
        wait_until(lambda: num_generated(running) > 0, "a first round", running)
        assert running.end(timeout=60) == 0
        thread.join(10)
        assert answers[0].status_code == 200
        assert len(answers[0].json()["choices"]) == 3
