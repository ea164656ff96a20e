"""The openai package, unchanged, over real sockets: sync, async, streaming, chat, errors."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import openai
import pytest

from service.api.app import create_app
from service.errors import Overloaded
from service.registry import ModelRegistry
from service.settings import Settings
from tests.api.fakes import FakeEngine, served
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


def test_responses_are_created_streamed_and_not_stored(client: openai.OpenAI) -> None:
    response = client.responses.create(model="tiny", input="Hi", instructions="Be kind.")
    assert response.output_text == "Hello, world"
    assert response.usage is not None
    assert response.usage.output_tokens == 13
    with client.responses.create(model="tiny", input="Hi", stream=True) as stream:
        events = list(stream)
    assert events[-1].type == "response.completed"
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == "Hello, world"
    with pytest.raises(openai.NotFoundError, match="stores no responses"):
        client.responses.retrieve(response.id)
    with pytest.raises(openai.BadRequestError, match="stores no responses"):
        client.responses.create(model="tiny", input="Hi", previous_response_id=response.id)


def test_the_streaming_helper_joins_a_response(client: openai.OpenAI) -> None:
    with client.responses.stream(model="tiny", input="Hi") as stream:
        snapshots = [e.snapshot for e in stream if e.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert snapshots[-1] == final.output_text == "Hello, world"
    history = [*final.output, {"role": "user", "content": "And?"}]
    again = client.responses.create(model="tiny", input=history)  # type: ignore[arg-type]
    assert again.status == "completed"


def test_a_response_that_fails_says_so_in_its_stream(
    client: openai.OpenAI, live: tuple[str, FakeEngine]
) -> None:
    live[1].fail_after = 2
    with client.responses.create(model="tiny", input="Hi", stream=True) as stream:
        *_, error, failed = list(stream)
    assert error.type == "error"
    assert failed.type == "response.failed"
    assert failed.response.error is not None
    assert "failed while" in failed.response.error.message


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


def wait_until_idle(engine: FakeEngine) -> None:
    end = time.monotonic() + 2
    while engine.live and time.monotonic() < end:
        time.sleep(0.01)
    assert engine.live == 0
