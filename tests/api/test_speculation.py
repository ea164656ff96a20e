"""Guessing ahead as clients see it: the same texts, told in usage and metrics."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

import httpx
import pytest

from model.bundled import bundled_model_path
from tests.running import Running, serving

pytestmark = pytest.mark.skipif(
    not (bundled_model_path() / "model.safetensors").is_file(), reason="no bundled weights here"
)
SONG = "The cat sat. The dog ran. The cat sat. The dog ran. The cat sat. The dog"


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    """The bundled model guesses for itself: always right, and not worth its time."""
    arguments = ["--dtype", "float32", "--num-kv-blocks", "64", "--block-size", "32"]
    arguments += ["--threads", "1", "--no-sample", "--speculative-method", "ngram"]
    arguments += ["--speculative-model", str(bundled_model_path())]
    arguments += ["--num-speculative-tokens", "4"]
    with serving(*arguments) as server:
        yield server


def complete(server: Running, **fields: object) -> dict[str, object]:
    body = {"prompt": SONG, "max_tokens": 40, "temperature": 0, **fields}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()  # type: ignore[no-any-return]


def shown(answer: dict[str, object]) -> list[object]:
    return [
        (choice["text"], choice["finish_reason"], choice["stop_reason"])
        for choice in answer["choices"]  # type: ignore[attr-defined]
    ]


def guesses(answer: dict[str, object]) -> tuple[int, int]:
    details = answer["usage"]["completion_tokens_details"]  # type: ignore[index]
    return details["accepted_prediction_tokens"], details["rejected_prediction_tokens"]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 0.8, "seed": 5, "n": 3},
        {"stop": ["ran"], "temperature": 0.3, "seed": 1},
        {"frequency_penalty": -2},
        {"logprobs": 2, "min_tokens": 20, "repetition_penalty": 1.1},
    ],
    ids=str,
)
def test_texts_are_the_same_whoever_guesses(server: Running, fields: dict[str, object]) -> None:
    plain = complete(server, speculation={"method": "none"}, **fields)
    assert guesses(plain) == (0, 0)
    for wanted in ({"method": "ngram"}, {"method": "draft"}, {"method": "draft", "num_tokens": 1}):
        guessed = complete(server, speculation=wanted, **fields)
        assert shown(guessed) == shown(plain)
        assert guessed["usage"]["completion_tokens"] == plain["usage"]["completion_tokens"]  # type: ignore[index]


def test_usage_and_metrics_tell_what_was_accepted(server: Running) -> None:
    """The server's default guesses by what stood in the text, here one that repeats itself."""
    before = counted(server)
    accepted, rejected = 0, 0
    for seed in range(60):  # guesses wait for a machine on which they pay
        answer = complete(server, frequency_penalty=-2, temperature=0.2, seed=seed)
        right, wrong = guesses(answer)
        accepted, rejected = accepted + right, rejected + wrong
        if accepted:
            break
    after = counted(server)
    told = {name: after[name] - before[name] for name in after}
    assert accepted > 0
    assert told["num_accepted_tokens"] >= accepted
    assert told["num_draft_tokens"] == accepted + rejected
    assert 0 < told["num_drafts"] <= told["num_draft_tokens"]


def counted(server: Running) -> dict[str, float]:
    """After a heartbeat: the engine's counters come with its state."""
    time.sleep(1.5)
    text = httpx.get(f"{server.url}/metrics").text
    found = re.findall(r"^vllm:spec_decode_(\w+)_total\{.*\} (\S+)$", text, re.MULTILINE)
    return {name: float(value) for name, value in found}


def test_a_stream_tells_it_in_its_last_chunk(server: Running) -> None:
    body = {
        "prompt": SONG,
        "max_tokens": 40,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "speculation": {"method": "draft"},
    }
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
    assert "accepted_prediction_tokens" in answer.text.splitlines()[-4]


def test_what_the_server_cannot_do_is_refused(server: Running) -> None:
    for wanted, param in (
        ({"num_tokens": 5}, "speculation.num_tokens"),
        ({"num_tokens": -1}, "speculation.num_tokens"),
        ({"method": "oracle"}, "speculation.method"),
    ):
        answer = httpx.post(
            f"{server.url}/v1/completions", json={"prompt": "a", "speculation": wanted}
        )
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == param
