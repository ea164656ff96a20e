"""Server-sent events, however they are cut and whoever wrote them."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.bench.events import EventLines, message_of, read_event

STREAM = b': ping\n\ndata: {"a":1}\r\n\r\nevent: x\ndata:{"b": "\xc3\xa9"}\n\ndata: [DONE]\n\n'
EVENTS = [b'{"a":1}', b'{"b": "\xc3\xa9"}', b"[DONE]"]


@given(st.lists(st.integers(0, len(STREAM)), max_size=8))
def test_events_do_not_depend_on_where_the_stream_is_cut(cuts: list[int]) -> None:
    places = [0, *sorted(cuts), len(STREAM)]
    pieces = [STREAM[a:b] for a, b in itertools.pairwise(places)]
    lines = EventLines()
    assert [data for piece in pieces for data in lines.push(piece)] == EVENTS


@pytest.mark.parametrize(
    ("data", "has_text", "is_last"),
    [
        (b'{"choices":[{"text":"a","finish_reason":null}],"usage":null}', True, False),
        (b'{"choices":[{"text":"","finish_reason":"length"}]}', False, True),
        (b'{"choices":[{"text":"end","finish_reason":"stop"}]}', True, True),
        (b'{"choices":[{"delta":{"role":"assistant","content":""}}]}', False, False),
        (b'{"choices":[{"delta":{"role":"assistant","content":null}}]}', False, False),
        (b'{"choices":[{"delta":{"content":"x"},"index":0,"extra":[1,{}]}]}', True, False),
        (b'{"choices":[{"delta":{"reasoning_content":"x"}}]}', True, False),
        (b'{"choices":[{"delta":{},"finish_reason":"stop"}]}', False, True),
        (b'{"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":2}}', False, False),
    ],
)
def test_what_an_event_brings(data: bytes, has_text: bool, is_last: bool) -> None:
    event = read_event(data)
    assert (event.has_text, event.is_last, event.failure) == (has_text, is_last, "")


def test_usage_with_and_without_details() -> None:
    full = b'{"prompt_tokens":9,"completion_tokens":2,"prompt_tokens_details":{"cached_tokens":7}}'
    event = read_event(b'{"choices":[],"usage":' + full + b"}")
    assert event.usage is not None
    assert (event.usage.prompt_tokens, event.usage.cached_tokens) == (9, 7)
    plain = read_event(b'{"usage":{"prompt_tokens":9,"prompt_tokens_details":null}}').usage
    assert plain is not None
    assert plain.cached_tokens == 0


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"error":{"message":"too full","code":"x"}}', "too full"),
        (b'{"error":"died"}', "died"),
        (b'{"error":null,"choices":[]}', ""),
    ],
)
def test_an_error_event_is_known_in_either_shape(data: bytes, message: str) -> None:
    assert read_event(data).failure == message


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"error":{"message":"m"}}', "m"),
        (b'{"detail":"d"}', "d"),
        (b'{"message":"m"}', "m"),
        (b"Bad Gateway", "Bad Gateway"),
        (b"", ""),
        (b"\xff", "�"),
        (b'"\xff', '"�'),
        (b"[" * 5000, "[" * 200),
    ],
)
def test_the_message_of_an_error_body(body: bytes, message: str) -> None:
    assert message_of(body) == message
