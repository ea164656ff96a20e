"""Adapters in the scheduler: slots, turns, refusals, and prefixes that are never shared."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from service.engine.adapters import PATIENCE, AdapterTable
from service.engine.blocks import BlockPool
from service.engine.messages import SamplingSettings, Submit
from service.engine.prefix import chain_root
from service.engine.step import Step, StepResult
from service.errors import InvalidRequest, ModelNotFound
from tests.engine.storm import Storm

PAGE, GRAIN = 8, 4


def a_storm(
    slots: int = 2, names: str = "abcd", num_blocks: int = 60, **fields: int
) -> tuple[Storm, AdapterTable]:
    table = AdapterTable(slots, 8)
    for name in names:
        table.add(name)
    storm = Storm(
        BlockPool(num_blocks, PAGE, GRAIN), fields.pop("seqs", 6), 32, adapters=table, **fields
    )
    return storm, table


class Asker:
    def __init__(self, table: AdapterTable) -> None:
        self._table, self._number = table, 0

    def __call__(self, name: str = "", tokens: int = 8, prompt: int = 5, n: int = 1) -> Submit:
        self._number += 1
        settings = [SamplingSettings(max_tokens=tokens, choice=i) for i in range(n)]
        version = self._table.versions[name] if name else 0
        return Submit(self._number, [7] * prompt, settings, adapter=name, adapter_version=version)


def steps_of(storm: Storm, count: int) -> list[Step]:
    found = []
    for _ in range(count):
        storm.collect()
        storm.launch()
        if storm.flight is not None:
            found.append(storm.flight[0])
    return found


def in_step(storm: Storm) -> list[int]:
    (step,) = steps_of(storm, 1)
    return [row.sequence.id for row in step.rows]


# ---- slots


def test_a_step_holds_no_more_adapters_than_there_are_slots() -> None:
    storm, table = a_storm(2)
    ask = Asker(table)
    for name in ("a", "b", "c", "", "d"):
        storm.submit(ask(name))
    assert sorted(in_step(storm)) == [1, 2, 4]
    storm.end()


def test_rows_without_an_adapter_come_first_then_slot_by_slot() -> None:
    storm, table = a_storm(2)
    ask = Asker(table)
    for name in ("a", "b", "", "a", "b", ""):
        storm.submit(ask(name))
    (step,) = steps_of(storm, 1)
    slots = [row.adapter for row in step.rows]
    assert slots == [None, None, 0, 0, 1, 1]
    assert sorted(step.fills) == sorted(
        {(row.adapter, row.sequence.adapter) for row in step.rows if row.adapter is not None}
    )
    (step,) = steps_of(storm, 1)
    assert step.fills == []
    storm.end()


def test_an_adapter_keeps_its_slot_until_another_needs_it() -> None:
    table = AdapterTable(2, 8)
    a, b, c = (table.add(name) for name in "abc")
    slots, loads = table.place([a, b])
    assert loads == [(slots[a], a), (slots[b], b)]
    assert table.place([b]) == ({b: slots[b]}, [])
    assert table.place([c]) == ({c: slots[a]}, [(slots[a], c)])
    assert table.place([b, c])[1] == []
    assert table.place([a, c]) == ({a: slots[b], c: slots[a]}, [(slots[b], a)])


def test_a_slot_of_one_that_is_gone_is_free_again() -> None:
    table = AdapterTable(1, 8)
    a, b = table.add("a"), table.add("b")
    table.place([a])
    table.retire("a")
    assert table.take_gone() == [a]
    assert table.place([b]) == ({b: 0}, [(0, b)])
    assert table.take_gone() == []


def test_a_slot_is_filled_again_after_a_step_that_came_to_nothing() -> None:
    storm, table = a_storm(2, "a")
    ask = Asker(table)
    storm.submit(ask("a"))
    step = storm.scheduler.schedule()
    assert step is not None
    assert [version for _, version in step.fills] == [table.versions["a"]]
    storm.scheduler.update(step, StepResult.failed(step, "it failed"))
    storm.scheduler.add(ask("a"))
    step = storm.scheduler.schedule()
    assert step is not None
    assert [version for _, version in step.fills] == [table.versions["a"]]


# ---- turns


def test_others_pass_who_waits_for_a_slot_but_not_for_ever() -> None:
    storm, table = a_storm(1)
    ask = Asker(table)
    storm.submit(ask("a", tokens=30))
    storm.submit(ask("b", tokens=3))
    storm.submit(ask("a", tokens=30))
    storm.submit(ask("", tokens=30))
    assert set(in_step(storm)) == {1, 3, 4}
    storm.now += PATIENCE + 0.01
    storm.submit(ask("a", tokens=3))
    storm.submit(ask("", tokens=30))
    assert set(in_step(storm)) == {1, 3, 4, 6}
    order: list[int] = []
    for _ in range(60):
        for step in steps_of(storm, 1):
            order += [row.sequence.id for row in step.rows if row.sequence.id not in order]
    assert order.index(2) < order.index(5), "who waited longest goes first"
    storm.end()


def test_nobody_starves_however_many_come_for_the_adapter_that_runs() -> None:
    storm, table = a_storm(1, max_queued_requests=200, max_queued_tokens=10_000)
    ask = Asker(table)
    for _ in range(4):
        storm.submit(ask("a", tokens=6))
    waiting = ask("b", tokens=3)
    storm.submit(waiting)
    num_steps = 0
    while not storm.answers[0, waiting.id].endings and num_steps < 400:
        storm.submit(ask("a", tokens=6))
        storm.run(1)
        storm.now += 0.02
        num_steps += 1
    assert num_steps < 100, "it waited for ever"
    storm.end()


def test_choices_and_preempted_ones_keep_within_the_slots() -> None:
    generator = random.Random(3)
    storm, table = a_storm(2, num_blocks=9, seqs=5)
    ask = Asker(table)
    for _ in range(300):
        if generator.random() < 0.4:
            name = generator.choice(["", "a", "b", "c", "d"])
            storm.submit(ask(name, generator.randint(1, 20), generator.randint(1, 30), 2))
        storm.collect()
        storm.launch()
        if storm.flight is not None:
            rows = storm.flight[0].rows
            assert len({row.sequence.adapter for row in rows} - {0}) <= 2
            by_slot = {row.adapter: row.sequence.adapter for row in rows}
            assert all(by_slot[row.adapter] == row.sequence.adapter for row in rows)
        storm.check()
    assert storm.scheduler.counters.preemptions > 0
    storm.end()


# ---- who may ask


def test_an_unknown_or_unloaded_adapter_is_refused() -> None:
    storm, table = a_storm(2, "a")
    ask = Asker(table)
    good = ask("a")
    for submit in (
        Submit(90, [1], good.settings, adapter="a", adapter_version=7),
        Submit(91, [1], good.settings, adapter="b", adapter_version=1),
    ):
        with pytest.raises(ModelNotFound):
            storm.scheduler.add(submit)
    table.retire("a")
    with pytest.raises(ModelNotFound):
        storm.scheduler.add(good)


def test_one_unloaded_while_in_use_serves_what_it_began() -> None:
    storm, table = a_storm(2, "a")
    ask = Asker(table)
    first, second = ask("a", tokens=10), ask("a")
    storm.submit(first)
    storm.run(3)
    old = table.versions["a"]
    table.retire("a")
    assert table.take_gone() == []
    assert storm.submit(second), "another prompt of the same request"
    assert table.add("a") != old
    third = ask("a")
    assert third.adapter_version != old
    storm.submit(third)
    storm.run(4)
    assert table.take_gone() == []
    storm.end()
    assert table.take_gone() == [old]
    assert storm.scheduler.adapters_in_use() == ([], [])


def test_a_cancelled_request_lets_its_adapter_go() -> None:
    storm, table = a_storm(2, "a")
    submit = Asker(table)("a")
    storm.submit(submit)
    storm.run(2)
    table.retire("a")
    storm.cancel(0, submit.id, None)
    assert table.take_gone() == [submit.adapter_version]
    storm.end()


def test_names_of_those_that_run_and_wait() -> None:
    storm, table = a_storm(1)
    ask = Asker(table)
    for name in ("b", "c", "", "a"):
        storm.submit(ask(name))
    storm.run(1)
    assert storm.scheduler.adapters_in_use() == (["b"], ["a", "c"])
    storm.end()
    assert storm.scheduler.adapters_in_use() == ([], [])


def test_no_more_adapters_than_memory_was_promised_for() -> None:
    table = AdapterTable(1, 2)
    table.add("a")
    table.add("b")
    table.check_room("a")
    with pytest.raises(InvalidRequest, match="at most 2"):
        table.check_room("c")
    with pytest.raises(InvalidRequest, match="without adapters"):
        AdapterTable().check_room("a")


# ---- prefixes


def test_prefixes_are_shared_within_a_version_alone() -> None:
    roots: list[Callable[[], bytes]] = [
        lambda: chain_root(b"n"),
        lambda: chain_root(b"n", "a", 1),
        lambda: chain_root(b"n", "a", 2),
        lambda: chain_root(b"n", "b", 1),
        lambda: chain_root(b"m", "a", 1),
        lambda: chain_root(b"na", "", 0),
    ]
    assert len({make() for make in roots}) == len(roots)
    storm, table = a_storm(2, "ab")
    ask = Asker(table)
    cached = []
    for name in ("", "a", "b", "a", ""):
        submit = ask(name, prompt=21)
        storm.submit(submit)
        storm.end()
        cached.append(storm.answers[0, submit.id].outputs[0].cached_tokens)
    table.add("a")
    submit = ask("a", prompt=21)
    storm.submit(submit)
    storm.end()
    cached.append(storm.answers[0, submit.id].outputs[0].cached_tokens)
    assert cached == [0, 0, 0, 20, 20, 0]
