"""Frames survive being cut anywhere, and nothing else passes for one."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engine.framing import BrokenFrame, FrameReader, encode_frame
from service.engine.messages import (
    Cancel,
    Control,
    FromEngine,
    Output,
    Outputs,
    SamplingSettings,
    Submit,
    ToEngine,
    TokenLogprob,
)

MESSAGES: list[ToEngine] = [
    Submit(id=1, prompt=[1, 2, 3], settings=[SamplingSettings(logit_bias={5: -1.5}, seed=2**63)]),
    Cancel(id=1),
    Cancel(id=1, choice=2),
    Control(id=0, verb="drain"),
]


@given(cuts=st.lists(st.integers(0, 300), max_size=8))
def test_messages_arrive_whole_however_the_bytes_are_cut(cuts: list[int]) -> None:
    data = b"".join(encode_frame(message) for message in MESSAGES)
    places = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    reader: FrameReader[ToEngine] = FrameReader(ToEngine)
    received = []
    for start, end in pairwise(places):
        received += reader.feed(data[start:end])
    assert received == MESSAGES


def test_what_the_engine_says_comes_back_equal() -> None:
    logprob = TokenLogprob(-0.5, 1, [3, 4], [-0.5, -1.0])
    output = Output(7, 0, [3], logprobs=[logprob], prompt_logprobs=[None, logprob])
    message = Outputs(step=1, num_scheduled_tokens=3, step_time=0.1, outputs=[output])
    reader: FrameReader[FromEngine] = FrameReader(FromEngine)
    assert reader.feed(encode_frame(message)) == [message]


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xff\xff\xff",  # a length past the bound
        b"\x01\x00\x00\x00\xc1",  # not msgpack
        b"\x08\x00\x00\x00\x81\xa4type\xa1\xa6",  # a kind in no UTF-8
        encode_frame(Output(1, 0, [])),  # a struct of the other direction
    ],
)
def test_anything_else_ends_the_connection(data: bytes) -> None:
    reader: FrameReader[ToEngine] = FrameReader(ToEngine)
    with pytest.raises(BrokenFrame):
        reader.feed(data)
