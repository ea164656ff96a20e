"""Properties over a live model: streams join to the whole, stops never leak, logprobs are right."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.bundled import bundled_model_path
from tests.api.conftest import chunks_of
from tests.running import serving

REFERENCES = json.loads(Path(__file__).with_name("reference_logprobs.json").read_text())

pytestmark = pytest.mark.skipif(
    not (bundled_model_path() / "model.safetensors").is_file(), reason="no bundled weights here"
)


@pytest.fixture(scope="module")
def http() -> Iterator[httpx.Client]:
    arguments = ["--dtype", "float32", "--num-kv-blocks", "64", "--block-size", "32"]
    arguments += ["--threads", "1", "--no-sample"]
    with serving(*arguments) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


def complete(http: httpx.Client, **body: Any) -> dict[str, Any]:
    response = http.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


# most of them begin in one token and end in the next
STOPS = ["the", ".", "ing", "e w", "e t", "d t", "s a", "n t", ", a", "y, ", "d h", "as a", "zzz"]
FIELDS = st.fixed_dictionaries(
    {
        "prompt": st.sampled_from(["The old man", "Once", '"', "In the é wood", [1, 300, 301]]),
        "seed": st.integers(0, 2**63 - 1),
        "max_tokens": st.integers(8, 40),
        "stop": st.lists(st.sampled_from(STOPS), min_size=0, max_size=4, unique=True),
    },
    optional={
        "n": st.integers(1, 3),
        "temperature": st.sampled_from([0, 0.7, 1, 2]),
        "top_p": st.sampled_from([0.3, 0.9, 1]),
        "top_k": st.sampled_from([-1, 1, 40]),
        "min_p": st.sampled_from([0, 0.1]),
        "presence_penalty": st.sampled_from([-1, 1.5]),
        "repetition_penalty": st.sampled_from([0.8, 1.3]),
        "logit_bias": st.just({"300": 5.0, "301": -100}),
        "include_stop_str_in_output": st.booleans(),
        "echo": st.booleans(),
        "logprobs": st.integers(0, 3),
        "ignore_eos": st.booleans(),
        "allowed_token_ids": st.just(list(range(200, 900))),
        "return_token_ids": st.booleans(),
    },
)


@settings(max_examples=25, deadline=None)
@given(fields=FIELDS)
def test_a_live_stream_joined_is_the_whole_and_leaks_no_stop(
    http: httpx.Client, fields: dict[str, Any]
) -> None:
    whole = complete(http, **fields)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = chunks_of(http.post("/v1/completions", json=fields | options).text)
    texts: dict[int, str] = dict.fromkeys(range(fields.get("n", 1)), "")
    ends: dict[int, Any] = {}
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        index = choice["index"]
        texts[index] += choice["text"]
        assert whole["choices"][index]["text"].startswith(texts[index])
        if choice["finish_reason"]:
            assert index not in ends, "one end for each choice"
            ends[index] = (choice["finish_reason"], choice["stop_reason"])
    for choice in whole["choices"]:
        assert texts[choice["index"]] == choice["text"]
        assert ends[choice["index"]] == (choice["finish_reason"], choice["stop_reason"])
    counted = ("prompt_tokens", "completion_tokens", "total_tokens")
    assert [chunks[-1]["usage"][key] for key in counted] == [whole["usage"][key] for key in counted]
    if not fields.get("echo") and not fields.get("include_stop_str_in_output"):
        free = complete(http, **(fields | {"stop": None}))["choices"]
        wanted = [cut(choice["text"], fields["stop"]) for choice in free]
        assert list(texts.values()) == wanted


def cut(text: str, stops: list[str]) -> str:
    """Before the stop string that ends first, the longest of those."""
    for end in range(1, len(text) + 1):
        if ended := [stop for stop in stops if text[:end].endswith(stop)]:
            return text[: end - len(max(ended, key=len))]
    return text


@pytest.mark.parametrize("entry", REFERENCES["entries"], ids=lambda entry: entry["prompt"])
def test_logprobs_are_those_of_transformers(http: httpx.Client, entry: dict[str, Any]) -> None:
    """In float32 to 1e-4: the prompt's by echo, those drawn, and the five likeliest of each."""
    rows = entry["rows"]
    drawn = len(rows) - len(entry["ids"]) + 1
    answer = complete(
        http,
        prompt=entry["prompt"],
        max_tokens=drawn,
        temperature=0,
        logprobs=5,
        echo=True,
        ignore_eos=True,
        return_tokens_as_token_ids=True,
    )
    found = answer["choices"][0]["logprobs"]
    assert found["token_logprobs"][0] is None
    assert found["tokens"] == [f"token_id:{t}" for t in [entry["ids"][0], *tokens_of(rows)]]
    assert found["token_logprobs"][1:] == pytest.approx([row["logprob"] for row in rows], abs=1e-4)
    for row, top in zip(rows, found["top_logprobs"][1:], strict=True):
        wanted = {f"token_id:{token}": value for token, value in row["top"].items()}
        assert {token: top[token] for token in wanted} == pytest.approx(wanted, abs=1e-4)


def tokens_of(rows: list[dict[str, Any]]) -> list[int]:
    return [row["token"] for row in rows]
