"""Beam search and ``best_of``: against the network's own log-probabilities, and at the bounds."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
import pytest_asyncio
from fastapi import FastAPI

from service.api.beams import BeamSearch
from service.engine.messages import SamplingSettings, TokenLogprob
from service.errors import Overloaded
from tests.api.conftest import refuse
from tests.api.fakes import BOS, EOS, FakeEngine, say
from tests.api.tiny import Tiny, tiny_checkpoint, tiny_server

URL = "/v1/completions"
real = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def tiny() -> AsyncIterator[Tiny]:
    with tiny_checkpoint() as (path, network):
        async with tiny_server(path, network) as tiny:
            yield tiny


def plain_search(
    tiny: Tiny,
    prompt: list[int],
    width: int,
    max_tokens: int,
    ends: list[int],
    penalty: float,
    min_tokens: int = 0,
) -> list[tuple[list[int], float]]:
    """Beam search as it is told in one breath, to the last token, by whole forward passes."""
    live: list[tuple[list[int], float]] = [([], 0.0)]
    ended: list[tuple[list[int], float]] = []
    for length in range(max_tokens):
        going = []
        for tokens, total in live:
            values = tiny.logprobs(prompt + tokens)[-1]
            best, ids = values.topk(2 * width + len(ends) * (min_tokens > 0))
            for value, token in zip(best.tolist(), ids.tolist(), strict=True):
                if token not in ends:
                    going.append(([*tokens, token], total + value))
                elif length >= min_tokens:
                    ended.append(([*tokens, token], total + value))
        live = sorted(going, key=lambda beam: -beam[1])[:width]

    def score(beam: tuple[list[int], float]) -> float:
        tokens, total = beam
        return total / (len(prompt) + len(tokens) - (tokens[-1] in ends)) ** penalty

    return sorted(ended + live, key=score, reverse=True)[:width]


@real
@pytest.mark.parametrize("width", [1, 2, 5, 20])
@pytest.mark.parametrize("penalty", [1.0, 0.0, -2.0, 3.0])
async def test_beams_are_those_of_a_plain_search(tiny: Tiny, width: int, penalty: float) -> None:
    prompt = [BOS, *b"The old man and the sea, a story of"]
    likely = tiny.logprobs(prompt)[-1].topk(3).indices.tolist()
    stops = [likely[1], 70, 111, 32]  # some of which come, early and late
    ends = [*stops, EOS]
    expected = plain_search(tiny, prompt, width, 7, ends, penalty)
    answer = await tiny.ask(
        URL,
        prompt=prompt,
        n=width,
        use_beam_search=True,
        length_penalty=penalty,
        max_tokens=7,
        stop_token_ids=stops,
        return_token_ids=True,
        logprobs=0,
    )
    choices = answer["choices"]
    assert [choice["token_ids"] for choice in choices] == [tokens for tokens, _ in expected]
    for choice, (tokens, total) in zip(choices, expected, strict=True):
        assert sum(choice["logprobs"]["token_logprobs"]) == pytest.approx(total, abs=1e-3)
        ended = tokens[-1] in ends
        assert choice["finish_reason"] == ("stop" if ended else "length")
        assert choice["stop_reason"] == (tokens[-1] if tokens[-1] in stops else None)
    assert len({tuple(choice["token_ids"]) for choice in choices}) == width
    assert answer["usage"]["completion_tokens"] == sum(len(tokens) for tokens, _ in expected)
    assert answer["usage"]["prompt_tokens"] == len(prompt)


@real
async def test_no_beam_ends_before_min_tokens(tiny: Tiny) -> None:
    prompt = list(b"Once upon")
    ends = tiny.logprobs(prompt)[-1].topk(6).indices.tolist()
    fields = {"prompt": prompt, "n": 2, "use_beam_search": True, "max_tokens": 6}
    answer = await tiny.ask(URL, **fields, stop_token_ids=ends, min_tokens=3, return_token_ids=True)
    found = [choice["token_ids"] for choice in answer["choices"]]
    expected = plain_search(tiny, prompt, 2, 6, [*ends, EOS], 1.0, min_tokens=3)
    assert found == [tokens for tokens, _ in expected]
    assert all(len(tokens) >= 3 for tokens in found)


@real
async def test_beams_repeat_the_prompt_and_its_logprobs(tiny: Tiny) -> None:
    answer = await tiny.ask(
        URL, prompt="Hi", n=2, use_beam_search=True, max_tokens=3, echo=True, logprobs=1
    )
    for choice in answer["choices"]:
        assert choice["text"].startswith("Hi")
        assert len(choice["logprobs"]["tokens"]) == 3 + 3
        assert choice["logprobs"]["token_logprobs"][0] is None


@real
async def test_best_of_shows_the_likeliest_of_what_was_drawn(tiny: Tiny) -> None:
    fields = {"prompt": [[70, 71], [80]], "max_tokens": 6, "seed": 5, "return_token_ids": True}
    every = await tiny.ask(URL, **fields, n=8, logprobs=0)
    best = await tiny.ask(URL, **fields, n=2, best_of=8)
    for prompt in range(2):
        choices = every["choices"][prompt * 8 : prompt * 8 + 8]

        def mean(choice: dict[str, Any]) -> float:
            values = choice["logprobs"]["token_logprobs"]
            return float(sum(values) / len(values))

        expected = sorted(choices, key=mean, reverse=True)[:2]
        shown = best["choices"][prompt * 2 : prompt * 2 + 2]
        assert [choice["token_ids"] for choice in shown] == [c["token_ids"] for c in expected]
        assert [choice["index"] for choice in shown] == [prompt * 2, prompt * 2 + 1]
        assert all(choice["logprobs"] is None for choice in shown)
    assert best["usage"] == every["usage"]


def ask_of(width: int, num_prompt: int = 3, penalty: float = 1.0, **settings: Any) -> BeamSearch:
    one = SamplingSettings(eos_token_ids=(9,), **settings)
    return BeamSearch(num_prompt, [one] * width, penalty)


def offered(*pairs: tuple[int, float]) -> TokenLogprob:
    return TokenLogprob(0.0, 1, [token for token, _ in pairs], [value for _, value in pairs])


def test_a_search_ends_once_nobody_can_do_better() -> None:
    search = ask_of(1, max_tokens=50)
    search.advance([offered((9, -0.1), (1, -9.0))])
    assert search.is_over  # -9 over 53 tokens is less than -0.1 over 3
    search = ask_of(1, max_tokens=50)
    search.advance([offered((9, -0.9), (1, -1.0))])
    assert not search.is_over
    search = ask_of(1, penalty=-1.0, max_tokens=50)
    search.advance([offered((9, -0.9), (1, -1.0))])
    assert search.is_over  # longer is only worse


def test_a_search_ends_when_all_have() -> None:
    search = ask_of(2, max_tokens=50)
    search.advance([offered((9, -0.1))])
    assert search.is_over
    assert [beam.tokens for beam in search.best()] == [[9]]


async def test_chat_answers_with_beams(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    """The fake engine always offers A, B and C."""
    response = await client.post(
        "/v1/chat/completions",
        json={
            "messages": [{"role": "user", "content": "Hi"}],
            "n": 2,
            "use_beam_search": True,
            "max_tokens": 2,
        },
    )
    assert response.status_code == 200, response.text
    texts = [choice["message"]["content"] for choice in response.json()["choices"]]
    assert texts == ["AA", "AB"]
    assert engine.live == 0
    assert [len(one["settings"]) for one in engine.submitted] == [1, 1, 1]


async def test_a_full_queue_refuses_the_first_round_and_delays_the_others(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    body = {"prompt": "Hi", "use_beam_search": True, "max_tokens": 2}
    engine.refusals = {0: Overloaded("full", retry_after=0.01)}
    assert (await client.post(URL, json=body)).status_code == 429
    engine.refusals = {2: Overloaded("full", retry_after=0.01)}
    response = await client.post(URL, json=body)
    assert response.json()["choices"][0]["text"] == "AA"
    assert len(engine.submitted) == 4


async def test_best_of_counts_what_was_generated(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    """The fake engine says that a token's log-probability is -id/100."""
    engine.script = lambda prompt, one: say(["z", "zz", "AAA"][one.choice])
    response = await client.post(URL, json={"prompt": "Hi", "best_of": 3})
    (choice,) = response.json()["choices"]
    assert choice["text"] == "AAA"
    assert response.json()["usage"]["completion_tokens"] == 2 + 3 + 4
    assert engine.submitted[0]["settings"][0].eos_token_ids == (EOS,)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"best_of": 21}, "best_of"),
        ({"best_of": 3, "stream": True}, "best_of"),
        ({"use_beam_search": True, "stream": True}, "use_beam_search"),
        ({"use_beam_search": True, "max_tokens": 0, "echo": True}, "max_tokens"),
        ({"use_beam_search": True, "stop": ["x"]}, "stop"),
        ({"use_beam_search": True, "logit_bias": {"65": 1}}, "logit_bias"),
        ({"use_beam_search": True, "presence_penalty": 0.5}, "presence_penalty"),
        ({"length_penalty": 2.0}, "length_penalty"),
        ({"use_beam_search": True, "length_penalty": 51}, "length_penalty"),
    ],
)
async def test_what_does_not_go_together_is_refused(
    client: httpx.AsyncClient, fields: dict[str, Any], param: str
) -> None:
    assert (await refuse(client, **fields))["param"] == param


async def test_best_of_is_bound_by_the_server_too(make_app: Callable[..., FastAPI]) -> None:
    from tests.api.conftest import talking_to

    async with talking_to(make_app(max_n=4)) as client:
        assert (await refuse(client, best_of=5))["param"] == "best_of"


@real
async def test_a_search_ends_at_its_deadline(tiny: Tiny) -> None:
    answer = await tiny.ask(
        URL, prompt="A", n=8, use_beam_search=True, max_tokens=400, ignore_eos=True, deadline_ms=100
    )
    assert {choice["stop_reason"] for choice in answer["choices"]} == {"deadline"}
    assert {choice["finish_reason"] for choice in answer["choices"]} == {"length"}
    assert answer["usage"]["completion_tokens"] < 8 * 400


async def test_later_rounds_and_waves_are_taken_while_the_engine_drains(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    await client.post(URL, json={"prompt": "Hi", "use_beam_search": True, "max_tokens": 3})
    assert [one["is_continuation"] for one in engine.submitted] == [False, True, True]
    engine.submitted.clear()
    await client.post(URL, json={"prompt": ["Hi"] * 300, "max_tokens": 1})
    told = [one["is_continuation"] for one in engine.submitted]
    assert told.count(False) == 256
    assert told.count(True) == 44
