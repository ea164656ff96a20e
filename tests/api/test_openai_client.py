"""The openai package, unchanged, over real sockets: sync, async, streaming, chat, errors."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import replace

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

WEATHER = openai.pydantic_function_tool(
    pydantic.create_model("Weather", city=(str, ...)), name="get_weather"
)
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
RESULT = {"role": "tool", "tool_call_id": "call_1", "content": "Rain."}


@pytest.fixture
def live() -> Iterator[tuple[str, FakeEngine]]:
    engine = FakeEngine()
    large = replace(served(engine), names=["large"], max_model_len=4096)  # tools take room
    registry = ModelRegistry([served(engine), large])
    app = create_app(Settings(api_key=["key"]), registry)
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


def test_tools_are_called_whole_and_streamed(
    client: openai.OpenAI, live: tuple[str, FakeEngine]
) -> None:
    live[1].script = lambda prompt, one: say(CALL)
    live[1].group = 4
    chat = client.chat.completions.create(model="large", messages=MESSAGES, tools=[WEATHER])
    assert chat.choices[0].finish_reason == "tool_calls"
    assert openai.types.chat.ChatCompletion.model_validate(chat.to_dict())
    with client.chat.completions.stream(
        model="large", messages=MESSAGES, tools=[WEATHER], parallel_tool_calls=True
    ) as stream:
        events = list(stream)
        final = stream.get_final_completion()
    deltas = [e for e in events if e.type == "tool_calls.function.arguments.delta"]
    assert len(deltas) > 2
    for choice in (chat.choices[0], final.choices[0]):
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content in (None, "")
        (call,) = choice.message.tool_calls or []
        assert isinstance(call, openai.types.chat.ChatCompletionMessageFunctionToolCall)
        assert call.function.name == "get_weather"
        assert json.loads(call.function.arguments) == {"city": "Paris"}
    history = [*MESSAGES, chat.choices[0].message.to_dict(), RESULT]
    live[1].script = lambda prompt, one: say("It rains.")
    answer = client.chat.completions.create(model="large", messages=history, tools=[WEATHER])  # type: ignore[arg-type]
    assert answer.choices[0].message.content == "It rains."


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
    assert [model.id for model in client.models.list()] == ["tiny", "org/alias", "large"]
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
