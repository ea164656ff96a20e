"""The whole of pronk, a real process with the bundled model, as the openai package sees it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pydantic
import pytest

from model.bundled import bundled_model_path
from tests.running import Running, serving

MODEL = "pronk"
HELLO: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": "Hello!"}]

pytestmark = pytest.mark.skipif(
    not (bundled_model_path() / "model.safetensors").is_file(), reason="no bundled weights here"
)


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    arguments = ["--dtype", "float32", "--num-kv-blocks", "64", "--block-size", "32"]
    arguments += ["--threads", "1", "--no-sample"]
    with serving(*arguments) as server:
        yield server


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    base = f"{server.url}/v1"
    with openai.OpenAI(base_url=base, api_key="none", max_retries=0, timeout=60) as client:
        yield client


def test_whole_and_streamed_answers_are_the_same_text(client: openai.OpenAI) -> None:
    options = {"model": MODEL, "prompt": "The old man", "max_tokens": 24, "seed": 3}
    whole = client.completions.create(**options)
    pieces = [chunk.choices[0].text for chunk in client.completions.create(**options, stream=True)]
    assert "".join(pieces) == whole.choices[0].text
    assert whole.usage is not None
    assert whole.usage.completion_tokens <= 24


CITY = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Paris", "Rome"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
}
TOOLS: list[openai.types.chat.ChatCompletionToolUnionParam] = [
    {"type": "function", "function": {"name": "get_weather", "parameters": CITY}},
    {"type": "function", "function": {"name": "get_time"}},
]


def test_calls_that_have_to_be_satisfy_their_schemas(client: openai.OpenAI) -> None:
    """Whatever a model of a few million parameters would rather say."""
    named: Any = {"type": "function", "function": {"name": "get_weather"}}
    for choice in ("required", named):
        for seed in range(3):
            answer = client.chat.completions.create(
                model=MODEL,
                messages=HELLO,
                tools=TOOLS,
                tool_choice=choice,
                parallel_tool_calls=False,
                seed=seed,
                max_tokens=200,
            )
            (told,) = answer.choices
            assert (told.finish_reason, told.message.content) == ("tool_calls", None)
            (call,) = told.message.tool_calls or []
            assert isinstance(call, openai.types.chat.ChatCompletionMessageFunctionToolCall)
            arguments = json.loads(call.function.arguments)
            if call.function.name == "get_weather":
                assert set(arguments) == {"city", "days"}
                assert arguments["city"] in ("Paris", "Rome")
                assert 1 <= arguments["days"] <= 9
            else:
                assert (call.function.name, arguments) == ("get_time", {})
    chunks = client.chat.completions.create(
        model=MODEL, messages=HELLO, tools=TOOLS, tool_choice=named, seed=0, stream=True
    )
    deltas = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    pieces = [call.function.arguments or "" for call in deltas if call.function]
    assert len(pieces) > 3
    assert json.loads("".join(pieces))["city"] in ("Paris", "Rome")


def test_chat_streams_and_reports_its_usage(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model=MODEL,
        messages=HELLO,
        max_tokens=16,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    whole = client.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=16, temperature=0
    )
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


async def test_an_answer_is_the_same_alone_and_among_many(server: Running) -> None:
    base = f"{server.url}/v1"
    async with openai.AsyncOpenAI(base_url=base, api_key="none", timeout=60) as client:

        async def one(seed: int) -> str:
            answer = await client.completions.create(
                model=MODEL, prompt="A dog", max_tokens=12, seed=seed, temperature=0.9
            )
            return answer.choices[0].text

        alone = [await one(seed) for seed in range(4)]
        together = await asyncio.gather(*[one(seed % 4) for seed in range(16)])
    assert together == alone * 4


def test_prompts_and_choices_come_in_order(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt=["The sea", "The king"], n=2, max_tokens=6, seed=1, echo=True
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert all(choice.text.startswith("The sea") for choice in answer.choices[:2])
    assert all(choice.text.startswith("The king") for choice in answer.choices[2:])


def test_a_deadline_gives_the_partial_answer(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL,
        prompt="A long story",
        max_tokens=900,
        extra_body={"deadline_ms": 200, "ignore_eos": True},
    )
    choice = answer.choices[0]
    assert (choice.finish_reason, choice.to_dict()["stop_reason"]) == ("length", "deadline")
    assert answer.usage is not None
    assert answer.usage.completion_tokens < 900


def test_a_prompt_is_scored_without_a_token(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt="The sea was calm", max_tokens=0, echo=True, logprobs=2
    )
    choice = answer.choices[0]
    assert (choice.text, choice.finish_reason) == ("The sea was calm", "length")
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 0
    assert choice.logprobs is not None
    assert choice.logprobs.token_logprobs is not None
    assert len(choice.logprobs.token_logprobs) == answer.usage.prompt_tokens
    assert all(value < 0 for value in choice.logprobs.token_logprobs[1:])


def test_a_stop_string_never_shows(client: openai.OpenAI) -> None:
    options = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 40, "temperature": 0}
    text = client.completions.create(**options).choices[0].text
    stop = text[8:13]
    before = text.split(stop)[0]
    stream = client.completions.create(**options, stop=[stop], stream=True)
    shown = ""
    for chunk in stream:
        shown += chunk.choices[0].text
        assert before.startswith(shown)
    assert shown == before


def test_a_repeated_prompt_is_found_in_the_cache(client: openai.OpenAI) -> None:
    prompt = "There was a ship that sailed to the north. " * 8
    for _ in range(2):
        answer = client.completions.create(model=MODEL, prompt=prompt, max_tokens=2)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert (answer.usage.prompt_tokens_details.cached_tokens or 0) >= 32


def test_hangups_free_every_block(server: Running) -> None:
    for stream in (True, False) * 5:
        hang_up_on(f"{server.url}/v1/completions", stream=stream)
    wanted = [
        'vllm:num_requests_running{engine="0",model_name="pronk"} 0.0',
        'vllm:num_requests_waiting{engine="0",model_name="pronk"} 0.0',
        'vllm:kv_cache_usage_perc{engine="0",model_name="pronk"} 0.0',
        "pronk:requests_in_flight 0.0",
    ]
    end = time.monotonic() + 5
    while True:
        text = httpx.get(f"{server.url}/metrics").text
        missing = [line for line in wanted if line not in text]
        if not missing or time.monotonic() > end:
            break
        time.sleep(0.05)
    assert not missing


def hang_up_on(url: str, *, stream: bool) -> None:
    """Ask for a long answer and go: after a stream's first bytes, or waiting for the whole."""
    body = {"prompt": "A long story", "max_tokens": 400, "ignore_eos": True, "stream": stream}
    with (
        contextlib.suppress(httpx.TimeoutException),
        httpx.stream("POST", url, json=body, timeout=0.15) as response,
    ):
        next(response.iter_bytes())


class Animal(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=12)
    legs: int = pydantic.Field(ge=0, le=8)
    tame: bool


def test_an_answer_is_parsed_into_the_model_that_was_asked_for(client: openai.OpenAI) -> None:
    for seed in range(3):
        answer = client.chat.completions.parse(
            model=MODEL, messages=HELLO, response_format=Animal, max_tokens=100, seed=seed
        )
        assert answer.choices[0].finish_reason == "stop"
        assert isinstance(answer.choices[0].message.parsed, Animal)
