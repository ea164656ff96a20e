"""The openai package, unchanged, over real sockets: sync, async, streaming, chat, errors."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Iterator

import openai
import pydantic
import pytest

from service.api.app import create_app
from service.errors import Overloaded
from service.registry import ModelRegistry
from service.settings import Settings
from tests.api.fakes import FakeEngine, say, served
from tests.api.live import listening

MESSAGES: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def live() -> Iterator[tuple[str, FakeEngine]]:
    engine = FakeEngine()
    app = create_app(Settings(api_key=["key"]), ModelRegistry([served(engine)]))
    with listening(app) as url:
        yield f"{url}/v1", engine


@pytest.fixture
def client(live: tuple[str, FakeEngine]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=live[0], api_key="key", max_retries=0) as client:
        yield client


def test_completions_and_chat_are_answered(client: openai.OpenAI) -> None:
    completion = client.completions.create(model="tiny", prompt="Hi", logprobs=2)
    assert completion.choices[0].text == "Hello, world"
    assert completion.usage is not None
    assert completion.usage.total_tokens == 16
    chat = client.chat.completions.create(
        model="tiny", messages=MESSAGES, logprobs=True, top_logprobs=2, n=2
    )
    assert [choice.message.content for choice in chat.choices] == ["Hello, world"] * 2
    assert chat.choices[0].logprobs is not None
    assert openai.types.chat.ChatCompletion.model_validate(chat.to_dict())


def test_streams_arrive_piece_by_piece(client: openai.OpenAI) -> None:
    with client.completions.create(model="tiny", prompt="Hi", stream=True) as stream:
        pieces = [chunk.choices[0].text for chunk in stream]
    assert "".join(pieces) == "Hello, world"
    assert len(pieces) > 5


def test_the_streaming_helper_joins_a_chat(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model="tiny", messages=MESSAGES, stream_options={"include_usage": True}
    ) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == "Hello, world"
    assert final.usage is not None
    assert final.usage.completion_tokens == 13


async def test_the_async_client_streams_many_at_once(live: tuple[str, FakeEngine]) -> None:
    async with openai.AsyncOpenAI(base_url=live[0], api_key="key", max_retries=0) as client:

        async def one() -> str:
            stream = await client.chat.completions.create(
                model="tiny", messages=MESSAGES, stream=True
            )
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

        assert await asyncio.gather(*[one() for _ in range(20)]) == ["Hello, world"] * 20


def test_models_are_listed_and_found(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "org/alias"]
    assert client.models.retrieve("org/alias").id == "org/alias"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nothing")


def test_errors_are_the_packages_own(client: openai.OpenAI, live: tuple[str, FakeEngine]) -> None:
    url, engine = live
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="tiny", prompt="Hi", temperature=3)
    assert refused.value.param == "temperature"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=url, api_key="no", max_retries=0).models.list()
    engine.refusal = Overloaded("full", retry_after=1)
    with pytest.raises(openai.RateLimitError) as limited:
        client.completions.create(model="tiny", prompt="Hi")
    assert limited.value.code == "queue_full"
    engine.refusal, engine.fail_after = None, 2
    with pytest.raises(openai.APIError, match="failed while"):
        list(client.completions.create(model="tiny", prompt="Hi", stream=True))


def test_closing_a_stream_frees_the_engine(
    client: openai.OpenAI, live: tuple[str, FakeEngine]
) -> None:
    engine = live[1]
    engine.pause, engine.script = 0.01, lambda prompt, one: [65]
    stream = client.completions.create(model="tiny", prompt="Hi", stream=True, max_tokens=190)
    next(iter(stream))
    assert engine.live == 1
    stream.close()
    client.close()
    wait_until_idle(engine)


def test_a_client_that_gives_up_on_a_whole_answer_frees_the_engine(
    live: tuple[str, FakeEngine],
) -> None:
    url, engine = live
    engine.pause, engine.script = 0.05, lambda prompt, one: [65]
    impatient = openai.OpenAI(base_url=url, api_key="key", max_retries=0, timeout=0.3)
    with pytest.raises(openai.APITimeoutError):
        impatient.completions.create(model="tiny", prompt="Hi", max_tokens=190)
    impatient.close()
    wait_until_idle(engine)


PERSON = {"name": "Ada", "age": 36}


class Person(pydantic.BaseModel):
    name: str
    age: int


@contextlib.contextmanager
def unless_unsupported() -> Iterator[None]:
    """Skips where the server says that it does not serve this: the test waits for the feature."""
    try:
        yield
    except openai.BadRequestError as error:
        if error.code == "unsupported_parameter":
            pytest.skip(f"{error.param} is not served yet")
        raise


def test_an_answer_is_parsed_into_a_pydantic_model(
    client: openai.OpenAI, live: tuple[str, FakeEngine]
) -> None:
    live[1].script = lambda prompt, one: say(json.dumps(PERSON))
    with unless_unsupported():
        answer = client.chat.completions.parse(
            model="tiny", messages=MESSAGES, response_format=Person
        )
    assert answer.choices[0].message.parsed == Person(**PERSON)
    with client.chat.completions.stream(
        model="tiny", messages=MESSAGES, response_format=Person
    ) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.parsed == Person(**PERSON)


def test_a_streamed_helper_tells_each_delta(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model="tiny", messages=MESSAGES, logprobs=True, top_logprobs=1, n=2
    ) as stream:
        events = list(stream)
    deltas = [event.delta for event in events if event.type == "content.delta"]
    assert "".join(sorted(deltas)) == "".join(sorted("Hello, world" * 2))
    done = [event.content for event in events if event.type == "content.done"]
    assert done == ["Hello, world"] * 2


def wait_until_idle(engine: FakeEngine) -> None:
    end = time.monotonic() + 2
    while engine.live and time.monotonic() < end:
        time.sleep(0.01)
    assert engine.live == 0
