"""Standing still is told apart from idling, loading and taking long for a reason."""

from __future__ import annotations

import pytest

from service.engine.messages import Outputs, State
from service.engine.watchdog import Watchdog


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def watched(patience: float = 10.0) -> tuple[Watchdog, Clock]:
    clock = Clock()
    return Watchdog(patience, clock), clock


def hear_for(watchdog: Watchdog, clock: Clock, seconds: int, state: State) -> None:
    for _ in range(seconds):
        clock.now += 1
        watchdog.heard(state)


def test_an_idle_engine_is_not_stalled() -> None:
    watchdog, clock = watched()
    hear_for(watchdog, clock, 100, State("ready"))
    assert not watchdog.is_stalled()


def test_a_loading_engine_is_not_stalled() -> None:
    watchdog, clock = watched()
    clock.now = 100
    assert not watchdog.is_stalled()
    hear_for(watchdog, clock, 1000, State("loading", progress=0.5))
    hear_for(watchdog, clock, 1000, State("warming_up"))
    assert not watchdog.is_stalled()


@pytest.mark.parametrize("stage", ["loading", "warming_up"])
def test_an_engine_that_loads_may_be_silent_for_long_but_not_for_ever(stage: str) -> None:
    """Imports and compilers hold the interpreter lock; what never comes back is stuck."""
    watchdog, clock = watched()
    watchdog.heard(State(stage))
    clock.now = 119
    assert not watchdog.is_stalled()
    clock.now = 121
    assert watchdog.is_stalled()
    assert watchdog.describe() == "no sign of life for 121 s"


def test_a_silent_engine_is_stalled() -> None:
    watchdog, clock = watched()
    watchdog.heard(State("ready"))
    clock.now = 9
    assert not watchdog.is_stalled()
    clock.now = 11
    assert watchdog.is_stalled()


def test_a_step_may_take_ten_times_its_estimate() -> None:
    watchdog, clock = watched()
    watchdog.heard(State("ready", running=1, steps=5))
    hear_for(watchdog, clock, 25, State("ready", running=1, steps=5, step_estimate=3.0))
    assert not watchdog.is_stalled()
    hear_for(watchdog, clock, 10, State("ready", running=1, steps=5, step_estimate=3.0))
    assert watchdog.is_stalled()


def test_work_without_steps_is_stalled_and_a_step_heals_it() -> None:
    watchdog, clock = watched()
    hear_for(watchdog, clock, 12, State("ready", waiting=1, steps=5))
    assert watchdog.is_stalled()
    watchdog.heard(Outputs(6, 1, 0.1, []))
    assert not watchdog.is_stalled()


def test_a_pause_of_the_whole_machine_is_held_against_nobody() -> None:
    watchdog, clock = watched()
    watchdog.heard(State("ready", steps=1, running=1))
    clock.now += 60
    assert watchdog.look()
    assert not watchdog.is_stalled()
    for _ in range(25):
        clock.now += 0.5
        assert not watchdog.look()
    assert watchdog.is_stalled()
