"""Every token that reaches this process is some request's, until the engine has let go of it."""

from __future__ import annotations

import asyncio

import pytest

from service.engine.messages import Output, Outputs, State
from service.engine.tally import Tally
from service.errors import Overloaded, PronkError
from tests.engine import scripted_engine as script
from tests.engine.test_client import (
    NEVER,
    STRICT,
    own_temporary_folder,
    serving,
    settings,
    until,
)

__all__ = ["own_temporary_folder"]  # the fixture, for these tests too


class Told:
    """How often it was told that all is settled, and how many tokens had been drawn by then."""

    def __init__(self, tally: Tally) -> None:
        self.drawn: list[int] = []
        tally.when_settled(lambda: self.drawn.append(tally.num_drawn))


def test_it_is_settled_once_when_the_last_of_several_ends() -> None:
    tally = Tally()
    tally.begin()
    tally.begin()
    told = Told(tally)
    tally.end()
    assert told.drawn == []
    tally.end()
    tally.begin()
    tally.end()
    assert told.drawn == [0]


def test_one_that_never_began_is_settled_at_once() -> None:
    assert Told(Tally()).drawn == [0]


def test_outputs_add_up() -> None:
    tally = Tally()
    tally.note(Output(1, 0, [7], prompt_tokens=9, cached_tokens=4, queue_time=0.5, prefill_time=1))
    tally.note(Output(1, 1, [7, 8]))
    tally.note(Output(2, 0, [], finish_reason="length", cached_tokens=0, queue_time=2.0))
    assert (tally.num_prompt, tally.num_cached, tally.num_drawn) == (9, 4, 3)
    assert (tally.queue_seconds, tally.prefill_seconds) == (2.0, 1)
    assert tally.decode_seconds is not None


async def test_tokens_on_their_way_when_a_reader_leaves_are_still_its_own() -> None:
    """The engine sends one a tick until it hears of it; its answer comes behind the last."""
    async with serving() as client:
        received = 0

        def count(message: Outputs | State) -> None:
            nonlocal received
            if isinstance(message, Outputs):
                received += sum(len(output.tokens) for output in message.outputs)

        client.observers.append(count)
        tallies = [Tally() for _ in range(20)]
        for tally in tallies:
            async with client.submit([script.COUNT], settings(NEVER), tally=tally) as generation:
                await anext(generation)
        told = [Told(tally) for tally in tallies]
        await until(lambda: all(one.drawn for one in told))
        assert sum(tally.num_drawn for tally in tallies) == received
        assert not client._left


async def test_a_stopped_choice_is_settled_when_the_engine_says_so() -> None:
    async with serving() as client:
        tally = Tally()
        async with client.submit([script.COUNT], settings(NEVER), tally=tally) as generation:
            await anext(generation)
            generation.stop(0)
            assert [output async for output in generation] == []
        told = Told(tally)
        assert told.drawn == [], "more may come"
        await until(lambda: told.drawn)
        assert told.drawn == [tally.num_drawn]


async def test_a_refusal_leaves_nothing_open() -> None:
    async with serving() as client:
        tally = Tally()
        with pytest.raises(Overloaded):
            async with client.submit([script.REFUSE], settings(), tally=tally):
                pass
        assert Told(tally).drawn == [0]


async def test_hanging_up_before_the_engine_answered_is_settled_by_its_answer() -> None:
    async with serving() as client:
        tally = Tally()

        async def ask() -> None:
            async with client.submit([script.IGNORE], settings(), tally=tally):
                raise AssertionError("never accepted")

        task = asyncio.create_task(ask())
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        told = Told(tally)
        await until(lambda: told.drawn)
        assert not client._left


@pytest.mark.parametrize("verb", [script.DIE, script.FREEZE])
async def test_an_engine_that_is_gone_settles_everything(verb: int) -> None:
    """Those that run, those just left, and those that waited for its word."""
    async with serving(patience=STRICT) as client:
        left, running, waiting = Tally(), Tally(), Tally()

        async def read() -> None:
            async with client.submit([script.COUNT], settings(NEVER), tally=running) as generation:
                async for _ in generation:
                    pass

        reader = asyncio.create_task(read())
        await until(lambda: client.state.running == 1)
        first = client.submit([script.COUNT], settings(NEVER), tally=left)
        await first.__aenter__()
        poison = asyncio.create_task(ask(client, verb, waiting))
        await first.__aexit__(None, None, None)  # its cancel is behind what ends the engine
        for task in (reader, poison):
            with pytest.raises(PronkError):  # a poison that killed two engines is refused as one
                await task
        told = [Told(tally) for tally in (left, running, waiting)]
        await until(lambda: all(one.drawn for one in told))
        assert not client._left


async def ask(client: object, verb: int, tally: Tally) -> None:
    async with client.submit([verb], settings(), tally=tally) as generation:  # type: ignore[attr-defined]
        async for _ in generation:
            pass
