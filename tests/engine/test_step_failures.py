"""Steps that raise: who is at fault is found, nobody else pays, memory that ran out is used better.

The worker's loop over a real socket, in turn and ahead, with a runner that fails on demand.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from msgspec.structs import replace

from service.engine.flight_recorder import FlightRecorder
from service.engine.messages import SamplingSettings, Submit
from tests.engine.test_worker import (
    FATAL,
    NUM_BLOCKS,
    POISON,
    Caller,
    ask,
    runs_ahead,
    serving,
)

__all__ = ["runs_ahead"]  # a fixture: every promise holds both ways


def endings(caller: Caller, numbers: range) -> dict[int, tuple[str, list[int]]]:
    """Of each request: how its choice ended, and all its tokens."""
    ends: dict[int, tuple[str, list[int]]] = {}
    tokens: dict[int, list[int]] = {number: [] for number in numbers}
    while len(ends) < len(numbers):
        for output in caller.hear_outputs().outputs:
            tokens[output.id] += output.tokens
            if output.finish_reason is not None:
                assert output.id not in ends, "ended twice"
                ends[output.id] = (output.finish_reason, tokens[output.id])
    return ends


def test_only_the_row_that_makes_a_step_raise_pays_for_it(tmp_path: Path) -> None:
    with serving(tmp_path, delay=0.002) as engine:
        caller = engine.call()
        caller.say(*(ask(i, max_tokens=30) for i in range(5)))
        while len(engine.runner.steps) < 3:
            time.sleep(0.001)
        caller.say(ask(5, first=POISON), *(ask(i, max_tokens=30) for i in (6, 7)))
        ends = endings(caller, range(8))
        assert ends.pop(5) == ("error", [])
        # Each token is the length of the text before it: none is lost and none is doubled.
        assert set(map(repr, ends.values())) == {repr(("length", [*range(5, 35)]))}
        state = caller.hear_state(running=0, waiting=0)
        assert state.free_blocks == NUM_BLOCKS - 1
        assert state.counters["failed_steps"] == 2  # all together, and it alone
        assert engine.runner.num_abandoned >= 2


def test_a_failed_step_is_logged_with_the_requests_it_was_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(tmp_path) as engine:
        caller = engine.call()
        caller.say(replace(ask(0, first=POISON), request_id="the-bad-one"))
        endings(caller, range(1))
    told = [record.__dict__.get("request_ids") for record in caplog.records]
    assert ["the-bad-one"] in told


def test_suspects_of_a_step_are_computed_one_at_a_time(tmp_path: Path) -> None:
    with serving(tmp_path) as engine:
        caller = engine.call()
        caller.say(ask(0), ask(1), ask(2, first=POISON), ask(3))
        endings(caller, range(4))
        steps = engine.runner.rows
        failed = steps.index([0, 1, 2, 3])
        assert steps[failed + 1 : failed + 5] == [[0], [1], [2], [3]]


def test_a_choice_of_many_and_a_long_prompt_survive_their_neighbour(tmp_path: Path) -> None:
    """Forks, chunks and a pool that is too small for all of them at once."""
    with serving(tmp_path, delay=0.001, max_num_batched_tokens=32) as engine:
        caller = engine.call()
        many = [SamplingSettings(max_tokens=6, choice=i) for i in range(4)]
        caller.say(Submit(0, [1, *range(150)], many), ask(1, length=200, max_tokens=20))
        caller.say(ask(2, first=POISON, length=3))
        ended: list[tuple[int, int, str]] = []
        while len(ended) < 6:
            ended += [
                (output.id, output.choice, output.finish_reason)
                for output in caller.hear_outputs().outputs
                if output.finish_reason is not None
            ]
        expected = [(0, i, "length") for i in range(4)] + [(1, 0, "length"), (2, 0, "error")]
        assert sorted(ended) == expected
        assert caller.hear_state(running=0, waiting=0).free_blocks == NUM_BLOCKS - 1


def test_a_step_too_large_for_memory_is_made_smaller_and_nobody_fails(tmp_path: Path) -> None:
    with serving(tmp_path) as engine:
        engine.runner.memory = 20
        caller = engine.call()
        caller.say(*(ask(i, length=40, max_tokens=10) for i in range(8)))
        ends = endings(caller, range(8))
        assert set(map(repr, ends.values())) == {repr(("length", [*range(40, 50)]))}
        assert 1 <= engine.runner.num_freed <= 4
        assert max(engine.runner.steps[-20:]) <= 20
        state = caller.hear_state(running=0, waiting=0)
        assert state.free_blocks == NUM_BLOCKS - 1
        # Memory that is there again is used again.
        engine.runner.memory = 1_000_000
        caller.say(*(ask(i, length=10, max_tokens=200) for i in range(8)))
        endings(caller, range(8))
        caller.say(*(ask(i, length=60) for i in range(8)))
        endings(caller, range(8))
        assert max(engine.runner.steps[-20:]) > 50


def test_who_does_not_even_fit_alone_fails_alone(tmp_path: Path) -> None:
    with serving(tmp_path) as engine:
        engine.runner.memory = 4  # less than the smallest chunk of a prompt
        caller = engine.call()
        caller.say(ask(0, length=100), ask(1, length=3), ask(2, length=4))
        ends = endings(caller, range(3))
        assert ends[0] == ("error", [])
        assert [ends[i][0] for i in (1, 2)] == ["length", "length"]
        assert engine.thread.is_alive()


def test_an_engine_without_memory_for_anything_leaves(tmp_path: Path) -> None:
    with serving(tmp_path) as engine:
        engine.runner.memory = 0
        caller = engine.call()
        caller.say(*(ask(i) for i in range(40)))
        assert engine.exit_code() == 5


@pytest.mark.parametrize("prompts", [[FATAL], [POISON] * 3])
def test_a_device_beyond_use_ends_the_engine_and_tells_who_was_at_hand(
    tmp_path: Path, prompts: list[int]
) -> None:
    recorder = FlightRecorder.create()
    with serving(tmp_path, recorder=recorder) as engine:
        caller = engine.call()
        *before, last = prompts
        for number, first in enumerate(before):
            caller.say(ask(number, first=first))
            assert caller.hear_end(number).finish_reason == "error"
        caller.say(ask(7, first=last))
        assert engine.exit_code() == 4
        assert recorder.read() == [7]
    recorder.close()


def test_an_idle_engine_has_nobody_at_hand(tmp_path: Path) -> None:
    recorder = FlightRecorder.create()
    with serving(tmp_path, recorder=recorder) as engine:
        caller = engine.call()
        caller.say(ask(3))
        caller.hear_end(3)
        caller.hear_state(running=0, waiting=0)
        assert recorder.read() == []
    recorder.close()
