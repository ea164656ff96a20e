"""The anthropic package, unchanged, over real sockets: whole, streamed, counted, errors."""

from __future__ import annotations

from collections.abc import Iterator

import anthropic
import pytest
from anthropic.types import MessageParam

from service.api.app import create_app
from service.errors import Overloaded
from service.registry import ModelRegistry
from service.settings import Settings
from tests.api.fakes import FakeEngine, served
from tests.api.live import listening

MESSAGES: list[MessageParam] = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def live() -> Iterator[tuple[str, FakeEngine]]:
    engine = FakeEngine()
    app = create_app(Settings(api_key=["key"]), ModelRegistry([served(engine)]))
    with listening(app) as url:
        yield url, engine


@pytest.fixture
def client(live: tuple[str, FakeEngine]) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=live[0], api_key="key", max_retries=0) as client:
        yield client


def test_a_message_is_answered(client: anthropic.Anthropic) -> None:
    message = client.messages.create(
        model="tiny", max_tokens=50, messages=MESSAGES, system="Be kind.", stop_sequences=["rld"]
    )
    [block] = message.content
    assert block.type == "text"
    assert block.text == "Hello, wo"
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "rld")
    assert message._request_id


def test_events_arrive_one_by_one(client: anthropic.Anthropic) -> None:
    with client.messages.create(
        model="tiny", max_tokens=50, messages=MESSAGES, stream=True
    ) as stream:
        events = [event.type for event in stream]
    assert events[0] == "message_start"
    assert events[-2:] == ["message_delta", "message_stop"]
    assert events.count("content_block_delta") == 12


def test_the_streaming_helper_joins_a_message(client: anthropic.Anthropic) -> None:
    with client.messages.stream(model="tiny", max_tokens=50, messages=MESSAGES) as stream:
        assert "".join(stream.text_stream) == "Hello, world"
        final = stream.get_final_message()
    whole = client.messages.create(model="tiny", max_tokens=50, messages=MESSAGES)
    assert [block.to_dict()["text"] for block in final.content] == ["Hello, world"]
    assert (final.usage, final.stop_reason) == (whole.usage, whole.stop_reason)
    history: list[MessageParam] = [
        *MESSAGES,
        {"role": "assistant", "content": whole.content},
        *MESSAGES,
    ]
    assert client.messages.create(model="tiny", max_tokens=50, messages=history).content


async def test_the_async_client_streams(live: tuple[str, FakeEngine]) -> None:
    async with (
        anthropic.AsyncAnthropic(base_url=live[0], auth_token="key", max_retries=0) as client,
        client.messages.stream(model="tiny", max_tokens=50, messages=MESSAGES) as stream,
    ):
        assert await stream.get_final_text() == "Hello, world"


def test_tokens_are_counted(client: anthropic.Anthropic) -> None:
    counted = client.messages.count_tokens(model="tiny", messages=MESSAGES)
    whole = client.messages.create(model="tiny", max_tokens=5, messages=MESSAGES)
    assert counted.input_tokens == whole.usage.input_tokens


def test_errors_are_the_packages_own(
    client: anthropic.Anthropic, live: tuple[str, FakeEngine]
) -> None:
    url, engine = live
    with pytest.raises(anthropic.BadRequestError, match="temperature"):
        client.messages.create(
            model="tiny", max_tokens=5, messages=MESSAGES, extra_body={"temperature": 3}
        )
    with pytest.raises(anthropic.NotFoundError) as unknown:
        client.messages.create(model="claude", max_tokens=5, messages=MESSAGES)
    assert unknown.value.type == "not_found_error"
    assert unknown.value.request_id
    with pytest.raises(anthropic.AuthenticationError):
        anthropic.Anthropic(base_url=url, api_key="no", max_retries=0).messages.count_tokens(
            model="tiny", messages=MESSAGES
        )
    engine.refusal = Overloaded("full", retry_after=1)
    with pytest.raises(anthropic.APIStatusError) as full:
        client.messages.create(model="tiny", max_tokens=5, messages=MESSAGES)
    assert (full.value.status_code, full.value.type) == (529, "overloaded_error")
    engine.refusal, engine.fail_after = None, 2
    with (
        pytest.raises(anthropic.APIStatusError, match="failed while"),
        client.messages.stream(model="tiny", max_tokens=5, messages=MESSAGES) as stream,
    ):
        stream.get_final_message()
