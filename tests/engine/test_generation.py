"""A reader gets every token once and in order, however slowly it reads."""

from __future__ import annotations

import asyncio

import pytest

from service.engine.generation import Generation
from service.engine.messages import Output, TokenLogprob
from service.errors import EngineFailure


def generation(num_choices: int = 1) -> tuple[Generation, list[int]]:
    cancelled: list[int] = []
    return Generation(1, num_choices, cancelled.append), cancelled


def logprob(value: float) -> TokenLogprob:
    return TokenLogprob(value, 1, [], [])


async def test_a_slow_reader_gets_one_merged_output_a_choice() -> None:
    own, _ = generation(2)
    for i in range(100):
        for choice in (0, 1):
            own.push(
                Output(
                    1,
                    choice,
                    [i],
                    logprobs=[logprob(-i)],
                    cached_tokens=3 if i == 0 else None,
                    finish_reason="length" if i == 99 else None,
                )
            )
    received = [output async for output in own]
    assert [output.choice for output in received] == [0, 1]
    for output in received:
        assert output.tokens == list(range(100))
        assert [known.logprob for known in output.logprobs or []] == [-i for i in range(100)]
        assert (output.cached_tokens, output.finish_reason) == (3, "length")


async def test_a_stopped_choice_gives_nothing_more_and_is_cancelled_once() -> None:
    own, cancelled = generation(2)
    own.push(Output(1, 0, [1]))
    assert (await anext(own)).tokens == [1]
    own.push(Output(1, 0, [2, 3]))
    own.stop(0)
    own.stop(0)
    own.push(Output(1, 0, [4]))
    own.push(Output(1, 1, [9], finish_reason="length"))
    assert [output.tokens async for output in own] == [[9]]
    assert cancelled == [0]
    assert own.num_discarded == 3


async def test_stopping_the_last_choice_ends_the_iteration() -> None:
    own, _ = generation()
    asyncio.get_running_loop().call_later(0.01, own.stop, 0)
    assert [output async for output in own] == []


async def test_a_failure_comes_after_what_had_arrived() -> None:
    own, _ = generation()
    own.push(Output(1, 0, [1]))
    own.fail(EngineFailure("gone"))
    assert (await anext(own)).tokens == [1]
    with pytest.raises(EngineFailure, match="gone"):
        await anext(own)
