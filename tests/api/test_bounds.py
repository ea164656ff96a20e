"""What a request may not say: each bound is a 400 that names the field."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.api.conftest import refuse
from tests.api.fakes import EOS, FakeEngine

URL = "/v1/completions"


@pytest.mark.parametrize(
    "prompt", ["", [], [[]], ["a", ""], [1, "a"], 5, {"a": 1}, [True], [[1.5]]]
)
async def test_empty_and_odd_prompts_are_refused(client: httpx.AsyncClient, prompt: Any) -> None:
    assert (await refuse(client, prompt=prompt))["param"] == "prompt"


async def test_a_missing_prompt_is_refused(client: httpx.AsyncClient) -> None:
    response = await client.post(URL, json={})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "prompt"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", 2.1),
        ("temperature", -1),
        ("temperature", "1"),
        ("temperature", True),
        ("top_p", 0),
        ("top_p", 1.1),
        ("min_p", 2),
        ("top_k", -2),
        ("top_k", 1.5),
        ("presence_penalty", 3),
        ("frequency_penalty", -3),
        ("repetition_penalty", 0),
        ("n", 0),
        ("n", 129),
        ("logprobs", 21),
        ("logprobs", True),
        ("prompt_logprobs", -1),
        ("stop", [""]),
        ("stop", ["a", "b", "c", "d", "e"]),
        ("stop_token_ids", [264]),
        ("stop_token_ids", [-1]),
        ("allowed_token_ids", []),
        ("allowed_token_ids", [1, 999]),
        ("bad_words", [""]),
        ("bad_words", ["x"] * 129),
        ("bad_words", ["x" * 257]),
        ("min_tokens", -1),
        ("min_tokens", 17),
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("max_tokens", 10**4000),
        ("seed", 1 << 63),
        ("seed", 10**300),
        ("temperature", 10**300),
        ("stream", 1),
        ("stream_options", {"include_usage": True}),
        ("user", 5),
        ("cache_salt", "x" * 129),
        ("truncate_prompt_tokens", 0),
        ("truncate_prompt_tokens", -2),
        ("truncation_side", "middle"),
        ("deadline_ms", 0),
        ("max_queue_ms", -1),
        ("priority", "high"),
        ("best_of", 0),
        ("response_format", {"type": "xml"}),
    ],
)
async def test_out_of_bounds_is_a_400_that_names_the_field(
    client: httpx.AsyncClient, field: str, value: Any
) -> None:
    error = await refuse(client, **{field: value})
    assert error["type"] == "invalid_request_error"
    assert error["param"].startswith(field)
    assert len(error["message"]) < 300


@pytest.mark.parametrize(
    ("bias", "param"),
    [
        ({"300": 1}, "logit_bias.300"),
        ({"a": 1}, "logit_bias.a"),
        ({"65": 101}, "logit_bias.65"),
        ({"-1": 0}, "logit_bias.-1"),
        ({"9" * 100_000: 1}, "logit_bias." + "9" * 20),
    ],
)
async def test_bias_keys_are_ids_and_its_values_bounded(
    client: httpx.AsyncClient, bias: dict[str, int], param: str
) -> None:
    error = await refuse(client, logit_bias=bias)
    assert error["param"] == param
    assert len(error["message"]) < 300


async def test_an_id_written_often_reaches_the_engine_once(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    fields = {"stop_token_ids": [70, 71] * 1000, "allowed_token_ids": [65, 66] * 1000}
    response = await client.post(URL, json={"prompt": "Hi", **fields})
    assert response.status_code == 200, response.text
    (settings,) = engine.submitted[-1]["settings"]
    assert settings.stop_token_ids == (70, 71)
    assert settings.allowed_token_ids == (65, 66)


@pytest.mark.parametrize(
    "fields",
    [
        {"allowed_token_ids": [EOS], "min_tokens": 2},
        {"allowed_token_ids": [65], "stop_token_ids": [65], "min_tokens": 2},
        {"allowed_token_ids": [65], "bad_words": ["A"]},
    ],
)
async def test_bans_that_leave_no_token_are_refused(
    client: httpx.AsyncClient, fields: dict[str, Any]
) -> None:
    error = await refuse(client, **fields)
    assert error["param"] == "allowed_token_ids"
