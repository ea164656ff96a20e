"""Evicted pages go to host memory and come back: the books, the order, and who may read what."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engine.blocks import BlockPool, PrefixMatch
from service.engine.host_slots import HostSlots
from service.engine.messages import SamplingSettings, Submit
from service.engine.step import Step, StepResult
from tests.engine.storm import Storm
from tests.engine.test_blocks import GRAIN, PAGE, fill, names


def grains(*numbers: int) -> list[bytes]:
    return [bytes([number]) for number in numbers]


def a_pool(num_blocks: int = 4, slots: int = 4) -> BlockPool:
    return BlockPool(num_blocks, PAGE, GRAIN, host=HostSlots(slots))


def exhaust(pool: BlockPool) -> list[int]:
    """Takes every block there is: all that is cached is evicted."""
    return [pool.allocate() for _ in range(pool.num_free)]


# ---- slots


def test_what_was_used_longest_ago_makes_room() -> None:
    slots = HostSlots(2)
    assert [slots.keep(grains(1)), slots.keep(grains(2))] == [0, 1]
    slots.pin(0)
    slots.end_step()
    assert slots.keep(grains(3)) == 1
    assert [slots.find(bytes([i])) for i in (1, 2, 3)] == [0, None, 1]
    assert slots.num_evictions == 1


def test_what_is_there_already_is_not_stored_again_but_counts_as_used() -> None:
    slots = HostSlots(2)
    slots.keep(grains(1, 2))
    slots.keep(grains(3))
    assert slots.keep(grains(1)) is None
    assert slots.keep(grains(4)) == 1
    assert slots.find(b"\x01") == 0


def test_a_longer_copy_of_a_page_takes_the_place_of_a_shorter_one() -> None:
    slots = HostSlots(3)
    first = slots.keep(grains(1, 2))
    longer = slots.keep(grains(1, 2, 3))
    assert {slots.find(digest) for digest in grains(1, 2, 3)} == {longer}
    assert slots.num_used == 1
    assert slots.num_evictions == 0
    assert first is not None


def test_a_slot_read_in_this_step_is_not_written_in_it() -> None:
    slots = HostSlots(1)
    slots.keep(grains(1))
    slots.pin(0)
    assert slots.keep(grains(2)) is None
    slots.forget(grains(1))
    assert slots.keep(grains(2)) is None, "emptied, and read all the same"
    slots.check()
    slots.end_step()
    assert slots.keep(grains(2)) == 0


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 30)), max_size=60))
def test_any_order_of_operations_loses_no_slot(moves: list[tuple[int, int]]) -> None:
    slots = HostSlots(4)
    for move, number in moves:
        digests = grains(number, number + 1, number + 2)
        if move == 0:
            slots.keep(digests[: 1 + number % 3])
        elif move == 1 and (slot := slots.find(digests[0])) is not None:
            slots.pin(slot)
        elif move == 2:
            slots.forget(digests)
        elif move == 3:
            slots.end_step()
        elif move == 4 and (slot := slots.find(digests[0])) is not None:
            slots.forget_slots([slot])
        slots.check()


# ---- the pool


def test_an_evicted_page_is_found_on_the_host() -> None:
    pool = a_pool()
    pool.release(fill(pool, *range(14)))  # a page and three of four grains
    exhaust(pool)
    assert sorted(pool.take_stores()) == [(1, 1, 8), (2, 0, 6)]  # last pages go first
    assert pool.take_stores() == []
    match = pool.match(names(*range(14)), 13)
    assert match == PrefixMatch([0], None, 0, 13, [(0, 1, 8), (1, 0, 5)])
    assert match.shared == []
    pool.check()


def test_a_page_in_the_pool_is_taken_before_its_copy_and_a_longer_copy_before_it() -> None:
    pool = a_pool()
    pool.release(fill(pool, *range(8)))
    held = exhaust(pool)
    pool.release(held)
    (again,) = fill(pool, *range(4))
    assert pool.match(names(*range(4)), 4) == PrefixMatch([], again, 4, 4)
    assert pool.match(names(*range(8)), 8).loads == [(0, 0, 8)]
    pool.check()


def test_pages_of_the_pool_and_of_the_host_alternate() -> None:
    pool = a_pool(5)
    first, second, third = fill(pool, *range(24))
    pool.release([second])
    taken = exhaust(pool)
    assert second in taken
    match = pool.match(names(*range(24)), 24)
    assert match == PrefixMatch([first, 0, third], None, 0, 24, [(1, 0, 8)])


def test_what_is_distrusted_is_forgotten_on_the_host_too() -> None:
    pool = a_pool()
    pool.release(fill(pool, *range(8)))
    (block,) = exhaust(pool)[:1]
    assert pool.match(names(*range(8)), 8).num_tokens == 8
    pool.distrust([block], names(*range(8)))
    assert pool.match(names(*range(8)), 8) == PrefixMatch()
    pool.check()


def test_forgetting_all_empties_the_host() -> None:
    pool = a_pool()
    pool.release(fill(pool, *range(8)))
    exhaust(pool)
    assert pool.host.num_used == 1
    pool.forget_all()
    assert pool.host.num_used == 0
    assert pool.match(names(*range(8)), 8) == PrefixMatch()
    pool.check()


# ---- the scheduler


def a_storm(num_blocks: int, slots: int) -> Storm:
    return Storm(BlockPool(num_blocks, PAGE, GRAIN, host=HostSlots(slots)), 2, 40)


def ask(storm: Storm, number: int, prompt: list[int]) -> None:
    storm.submit(Submit(number, prompt, [SamplingSettings(max_tokens=2)]))


def answered(storm: Storm, number: int, prompt: list[int]) -> tuple[Step, int]:
    """Its first step, and how many of its tokens were cached."""
    ask(storm, number, prompt)
    storm.launch()
    assert storm.flight is not None
    step = storm.flight[0]
    storm.end()
    cached = storm.answers[0, number].outputs[0].cached_tokens
    assert cached is not None
    return step, cached


FIRST, OTHER = list(range(27)), list(range(20, 47))


def test_a_prompt_that_had_to_make_room_is_loaded_instead_of_computed() -> None:
    storm = a_storm(num_blocks=5, slots=8)
    answered(storm, 1, FIRST)
    step, cached = answered(storm, 2, OTHER)
    assert (cached, len(step.stores)) == (0, 4)
    step, cached = answered(storm, 3, FIRST)
    assert cached == 26
    assert sorted(tokens for _, _, tokens in step.loads) == [2, 8, 8, 8]
    counters = storm.scheduler.counters
    assert (counters.host_hits, counters.prefix_hits, counters.host_loads) == (26, 26, 4)
    assert counters.host_stores >= 8


def test_what_was_loaded_is_shared_from_then_on() -> None:
    storm = a_storm(num_blocks=5, slots=8)
    answered(storm, 1, FIRST)
    answered(storm, 2, OTHER)
    answered(storm, 3, FIRST)
    step, cached = answered(storm, 4, FIRST)
    assert (cached, step.loads) == (26, [])


def test_a_page_may_be_copied_from_and_loaded_into_in_one_step() -> None:
    """So copies come before loads."""
    storm = a_storm(num_blocks=3, slots=8)
    loaded, copied = list(range(8)), [50, 51, 52, 53]
    settings = [SamplingSettings(max_tokens=1)]
    for number, prompt in enumerate([loaded, list(range(20, 36)), copied]):
        storm.submit(Submit(number, prompt, settings))
        storm.end()
    storm.submit(Submit(3, [*copied, 60], settings))
    storm.submit(Submit(4, loaded, settings))
    storm.launch()
    assert storm.flight is not None
    step = storm.flight[0]
    ((source, _, kept),) = step.copies
    ((_, target, found),) = step.loads
    assert source == target
    assert (kept, found) == (4, 7)
    storm.end()


def test_without_slots_it_is_computed_again() -> None:
    storm = a_storm(num_blocks=5, slots=0)
    answered(storm, 1, FIRST)
    answered(storm, 2, OTHER)
    step, cached = answered(storm, 3, FIRST)
    assert (cached, step.loads, step.stores) == (0, [], [])


def test_what_a_step_that_raised_should_have_stored_is_not_believed() -> None:
    storm = a_storm(num_blocks=5, slots=8)
    answered(storm, 1, FIRST)
    ask(storm, 2, OTHER)
    storm.launch_in_vain()
    assert storm.flight is not None
    assert storm.flight[0].stores
    storm.collect()
    assert storm.pool.host.num_used == 0
    _, cached = answered(storm, 3, FIRST)
    assert cached == 0


def test_a_failed_row_takes_the_copies_it_was_loaded_from_with_it() -> None:
    storm = a_storm(num_blocks=5, slots=8)
    answered(storm, 1, FIRST)
    answered(storm, 2, OTHER)
    ask(storm, 3, FIRST)
    storm.launch()
    assert storm.flight is not None
    assert storm.flight[0].loads
    storm.collect(failing=0)
    _, cached = answered(storm, 4, FIRST)
    assert cached == 0


@pytest.mark.parametrize("slots", [1, 2, 5, 30])
def test_a_storm_over_few_pages_stores_and_loads(slots: int) -> None:
    """Long prompts of few kinds: every step proves that what it reads is its own."""
    dice = random.Random(slots)
    storm = a_storm(num_blocks=9, slots=slots)
    for number in range(150):
        stem = [dice.choice([3, 5, 7, 11])] * dice.randint(1, 50)
        ask(storm, number, [*stem, dice.randrange(4)])
        storm.run(dice.randint(1, 6))
        if dice.random() < 0.1:
            storm.launch_in_vain()
        storm.check()
    storm.end()
    assert storm.num_stores > 20
    assert storm.num_loads > (0 if slots == 1 else 10)


def test_a_failed_step_says_that_it_did_not_run() -> None:
    assert not StepResult.failed(Step(0), "x").has_run
