"""``/v1/completions`` over a fake engine: shapes, bounds, usage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from service.errors import Overloaded
from tests.api.conftest import chunks_of, refuse, talking_to
from tests.api.fakes import BOS, EOS, FakeEngine, say

URL = "/v1/completions"


async def ask(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    response = await client.post(URL, json={"prompt": "Hi", "max_tokens": 50} | fields)
    assert response.status_code == 200, response.text
    return response.json()


async def test_an_answer_has_every_key(client: httpx.AsyncClient) -> None:
    answer = await ask(client)
    assert answer["choices"] == [
        {
            "index": 0,
            "text": "Hello, world",
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
        }
    ]
    assert answer["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 13,
        "total_tokens": 16,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }
    assert answer["object"] == "text_completion"
    assert (answer["model"], answer["system_fingerprint"]) == ("tiny", "fp_test")
    assert answer["id"].startswith("cmpl-")


async def test_defaults_are_the_wires(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    await client.post(URL, json={"prompt": "Hi"})
    settings = engine.submitted[0]["settings"][0]
    assert (settings.max_tokens, settings.temperature, settings.top_k) == (16, 1.0, 0)
    assert settings.eos_token_ids == (EOS,)


async def test_null_means_absent_in_every_field(client: httpx.AsyncClient) -> None:
    from service.api.schemas.completions import CompletionRequest

    nulls = {name: None for name in CompletionRequest.model_fields if name != "prompt"}
    assert (await ask(client, **nulls))["choices"][0]["text"] == "Hello, world"


async def test_the_checkpoints_defaults_hold_where_the_client_says_nothing(
    make_app: Callable[..., FastAPI], engine: FakeEngine
) -> None:
    app = make_app()
    model = app.state.server.models.get(None, None)
    model.generation_defaults = {"temperature": 0.6, "top_p": 0.9, "top_k": 40}
    async with talking_to(app) as client:
        await ask(client, top_p=0.5)
    settings = engine.submitted[0]["settings"][0]
    assert (settings.temperature, settings.top_p, settings.top_k) == (0.6, 0.5, 40)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("Hi", [[BOS, 72, 105]]),
        (["Hi", "yo"], [[BOS, 72, 105], [BOS, 121, 111]]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
        ("</s>", [[BOS, EOS]]),
    ],
)
async def test_prompts_come_in_four_shapes(
    client: httpx.AsyncClient, engine: FakeEngine, prompt: Any, expected: list[list[int]]
) -> None:
    answer = await ask(client, prompt=prompt)
    assert [submitted["prompt"] for submitted in engine.submitted] == expected
    assert answer["usage"]["prompt_tokens"] == sum(map(len, expected))


async def test_special_text_stays_text_where_asked(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    await ask(client, prompt="</s>", parse_special_tokens=False, add_special_tokens=False)
    assert engine.submitted[0]["prompt"] == list(b"</s>")


async def test_choices_are_numbered_prompt_major(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.script = lambda prompt, one: say(f"{chr(prompt[-1])}{one.choice}")
    answer = await ask(client, prompt=["a", "b"], n=2)
    assert [(c["index"], c["text"]) for c in answer["choices"]] == [
        (0, "a0"),
        (1, "a1"),
        (2, "b0"),
        (3, "b1"),
    ]
    assert answer["usage"]["completion_tokens"] == 12


async def test_harmless_spellings_of_unsupported_fields_pass(client: httpx.AsyncClient) -> None:
    await ask(
        client,
        best_of=1,
        suffix="",
        use_beam_search=False,
        length_penalty=1,
        response_format={"type": "text"},
    )


async def test_settings_reach_the_engine(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    await ask(
        client,
        temperature=0,
        top_p=0.5,
        top_k=-1,
        min_p=0.1,
        presence_penalty=1,
        frequency_penalty=-1,
        repetition_penalty=1.2,
        seed=-5,
        min_tokens=2,
        ignore_eos=True,
        stop_token_ids=[10],
        allowed_token_ids=[65, 66],
        logit_bias={"65": -100, "66": 2.5},
        bad_words=["ab"],
        logprobs=0,
        priority=-3,
        deadline_ms=1500,
        max_queue_ms=250,
    )
    sent = engine.submitted[0]
    settings = sent["settings"][0]
    assert (settings.temperature, settings.top_p, settings.top_k, settings.min_p) == (
        0,
        0.5,
        0,
        0.1,
    )
    assert (settings.presence_penalty, settings.frequency_penalty) == (1, -1)
    assert (settings.repetition_penalty, settings.seed, settings.min_tokens) == (1.2, -5, 2)
    assert (settings.eos_token_ids, settings.stop_token_ids) == ((), (10,))
    assert settings.allowed_token_ids == (65, 66)
    assert settings.logit_bias == {65: -100.0, 66: 2.5}
    assert settings.bad_words == ((97, 98), (32, 97, 98))
    assert settings.logprobs == 0
    assert (sent["priority"], sent["max_queue"]) == (-3, 0.25)
    assert 1 < sent["deadline"] <= 1.5


async def test_choices_share_the_seed_and_differ_by_number(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    await ask(client, n=3)
    settings = engine.submitted[0]["settings"]
    assert len({one.seed for one in settings}) == 1
    assert [one.choice for one in settings] == [0, 1, 2]


async def test_seeds_are_drawn_anew_unless_the_server_was_given_one(
    make_app: Callable[..., FastAPI], engine: FakeEngine
) -> None:
    for app in (make_app(seed=7), make_app(seed=7), make_app(), make_app()):
        async with talking_to(app) as client:
            await ask(client)
    first, second, third, fourth = (sent["settings"][0].seed for sent in engine.submitted)
    assert first == second
    assert len({first, third, fourth}) == 3


# ---- context


async def test_a_stated_budget_past_the_context_names_both_numbers_and_what_fits(
    client: httpx.AsyncClient,
) -> None:
    error = await refuse(client, prompt=[1] * 150, max_tokens=51)
    assert error["code"] == "context_length_exceeded"
    assert all(number in error["message"] for number in ("200", "150", "51", "50"))


async def test_a_default_is_cut_to_what_fits(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    response = await client.post(URL, json={"prompt": [1] * 195})
    assert response.status_code == 200
    assert engine.submitted[0]["settings"][0].max_tokens == 5


async def test_a_prompt_that_fills_the_context_is_refused(client: httpx.AsyncClient) -> None:
    error = await refuse(client, prompt=[1] * 200)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"truncate_prompt_tokens": 2}, [3, 4]),
        ({"truncate_prompt_tokens": 2, "truncation_side": "right"}, [1, 2]),
        ({"truncate_prompt_tokens": 9}, [1, 2, 3, 4]),
    ],
)
async def test_prompts_are_truncated_on_the_side_asked_for(
    client: httpx.AsyncClient, engine: FakeEngine, fields: dict[str, Any], expected: list[int]
) -> None:
    await ask(client, prompt=[1, 2, 3, 4], **fields)
    assert engine.submitted[0]["prompt"] == expected


async def test_truncation_to_what_fits_leaves_room_for_the_answer(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    await ask(client, prompt=list(range(250)), truncate_prompt_tokens=-1, max_tokens=20)
    assert engine.submitted[0]["prompt"] == list(range(70, 250))


# ---- echo and logprobs


async def test_echo_opens_the_answer_with_the_prompt(client: httpx.AsyncClient) -> None:
    answer = await ask(client, echo=True)
    assert answer["choices"][0]["text"] == "HiHello, world"
    assert (await ask(client, prompt=[BOS, 72], echo=True))["choices"][0]["text"].startswith("HH")


async def test_logprobs_are_parallel_lists_with_offsets_into_the_text(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.script = lambda prompt, one: [260, 65, EOS]
    logprobs = (await ask(client, logprobs=2))["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["ab", "A", "</s>"]
    assert logprobs["token_logprobs"] == [-2.6, -0.65, -2.57]
    assert logprobs["text_offset"] == [0, 2, 3]
    assert logprobs["top_logprobs"][0] == {"ab": -2.6, "A": -0.65, "B": -0.66}


async def test_zero_logprobs_are_on_without_alternatives(client: httpx.AsyncClient) -> None:
    logprobs = (await ask(client, logprobs=0))["choices"][0]["logprobs"]
    assert logprobs["top_logprobs"][0] == {"H": -0.72}


async def test_tokens_can_be_named_by_their_ids(client: httpx.AsyncClient) -> None:
    answer = await ask(client, logprobs=0, return_tokens_as_token_ids=True)
    assert answer["choices"][0]["logprobs"]["tokens"][0] == "token_id:72"


async def test_echo_with_logprobs_shows_the_prompts_too(client: httpx.AsyncClient) -> None:
    answer = await ask(client, echo=True, logprobs=1, max_tokens=1)
    logprobs = answer["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["<s>", "H", "i", "H"]
    assert logprobs["token_logprobs"] == [None, -0.72, -1.05, -0.72]
    assert logprobs["text_offset"] == [0, 0, 1, 2]
    assert logprobs["top_logprobs"][0] is None


@pytest.mark.parametrize("stream", [False, True])
async def test_no_tokens_with_echo_scores_the_prompt(
    client: httpx.AsyncClient, stream: bool
) -> None:
    fields = {"prompt": "Hi", "max_tokens": 0, "echo": True, "logprobs": 1, "stream": stream}
    response = await client.post(URL, json=fields)
    answers = chunks_of(response.text) if stream else [response.json()]
    assert len(answers) == 1
    choice = answers[0]["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("Hi", "length")
    assert choice["logprobs"]["tokens"] == ["<s>", "H", "i"]
    if not stream:
        assert answers[0]["usage"]["completion_tokens"] == 0


async def test_prompt_logprobs_begin_with_null(client: httpx.AsyncClient) -> None:
    answer = await ask(client, prompt_logprobs=1, n=2)
    for choice in answer["choices"]:
        first, second, _ = choice["prompt_logprobs"]
        assert first is None
        assert second["72"] == {"logprob": -0.72, "rank": 3, "decoded_token": "H"}
        assert second["65"] == {"logprob": -0.65, "rank": 1, "decoded_token": "A"}
        assert len(second) == 2


async def test_prompt_logprobs_cannot_be_streamed(client: httpx.AsyncClient) -> None:
    error = await refuse(client, prompt_logprobs=1, stream=True)
    assert error["param"] == "prompt_logprobs"


async def test_token_ids_are_returned_on_demand(client: httpx.AsyncClient) -> None:
    choice = (await ask(client, return_token_ids=True, max_tokens=2))["choices"][0]
    assert choice["prompt_token_ids"] == [BOS, 72, 105]
    assert choice["token_ids"] == [72, 101]


# ---- stops


async def test_a_stop_string_is_cut_off_and_named(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    answer = await ask(client, stop="o, w")
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("Hell", "stop")
    assert choice["stop_reason"] == "o, w"
    assert answer["usage"]["completion_tokens"] == 8
    assert engine.stopped == [(0, 0)]


async def test_a_stop_string_can_be_kept(client: httpx.AsyncClient) -> None:
    answer = await ask(client, stop=["zzz", "llo"], include_stop_str_in_output=True)
    assert answer["choices"][0]["text"] == "Hello"


async def test_a_stop_id_is_named_and_no_part_of_the_text(client: httpx.AsyncClient) -> None:
    choice = (await ask(client, stop_token_ids=[ord("w")]))["choices"][0]
    assert (choice["text"], choice["stop_reason"]) == ("Hello, ", ord("w"))


async def test_special_tokens_are_shown_on_demand(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.script = lambda prompt, one: [65, BOS, 66, EOS]
    assert (await ask(client))["choices"][0]["text"] == "AB"
    answer = await ask(client, skip_special_tokens=False)
    assert answer["choices"][0]["text"] == "A<s>B"


async def test_cached_tokens_are_told(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.cached = 2
    usage = (await ask(client, prompt=["Hi", "Hi"]))["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == 4


# ---- the caches' borders


async def test_prefixes_are_shared_within_a_key_and_a_salt_only(
    make_app: Callable[..., FastAPI], engine: FakeEngine
) -> None:
    async with talking_to(make_app(api_key=["a", "b"])) as client:
        for key, salt in [("a", None), ("a", None), ("a", "x"), ("b", None)]:
            headers = {"Authorization": f"Bearer {key}"}
            await client.post(URL, json={"prompt": "Hi", "cache_salt": salt}, headers=headers)
    names = [sent["namespace"] for sent in engine.submitted]
    assert names[0] == names[1]
    assert len(set(names)) == 3


# ---- many prompts


async def test_a_large_request_is_fed_to_the_engine_in_waves(
    make_app: Callable[..., FastAPI], engine: FakeEngine
) -> None:
    most = 0

    def watch(prompt: list[int], one: object) -> list[int]:
        nonlocal most
        most = max(most, engine.busy)
        return say(str(prompt[0]))

    engine.script = watch
    async with talking_to(make_app(max_queued_requests=10)) as client:
        answer = await ask(client, prompt=[[token] for token in range(50)], n=2)
    assert [choice["text"] for choice in answer["choices"]] == [str(i // 2) for i in range(100)]
    assert answer["usage"]["prompt_tokens"] == 50
    assert most == 5  # of two choices each
    assert engine.live == 0


async def test_a_later_wave_waits_where_the_queue_is_full(
    make_app: Callable[..., FastAPI], engine: FakeEngine
) -> None:
    async with talking_to(make_app(max_queued_requests=2)) as client:
        engine.refusals = {3: Overloaded("full", retry_after=0.01)}
        answer = await ask(client, prompt=["a", "b", "c", "d", "e"])
    assert len(answer["choices"]) == 5
    assert len(engine.submitted) == 6


async def test_too_many_prompts_are_refused(client: httpx.AsyncClient) -> None:
    assert (await refuse(client, prompt=["a"] * 2049))["param"] == "prompt"


async def test_prompts_and_answers_are_logged_only_on_demand(
    make_app: Callable[..., FastAPI], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    for is_logged in (False, True):
        async with talking_to(make_app(log_content=is_logged)) as client:
            await ask(client, prompt="a secret question")
        answers = [record.__dict__.get("answer") for record in caplog.records]
        assert ("Hello, world" in answers) == is_logged
        assert ("a secret question" in str([vars(r) for r in caplog.records])) == is_logged


@pytest.mark.parametrize("skips", [True, False])
async def test_offsets_of_an_echoed_text_are_places_in_it(
    client: httpx.AsyncClient, skips: bool
) -> None:
    """A client's own text shows the special tokens it spells, and none that was put before it."""
    answer = await ask(
        client, prompt="a</s>b", echo=True, logprobs=0, max_tokens=1, skip_special_tokens=skips
    )
    choice = answer["choices"][0]
    assert choice["text"].startswith("a</s>b")
    assert choice["logprobs"]["tokens"][:4] == ["<s>", "a", "</s>", "b"]
    assert choice["logprobs"]["text_offset"] == [0, 0, 1, 5, 6]
