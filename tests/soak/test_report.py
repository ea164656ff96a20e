"""A soak's judge: a good run has no fault, and each thing that must not be is found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.soak.report import faults, write
from tests.soak.run import Rest, Soak, Visited
from tests.traffic.processes import Sample


def a_sample(at: float, engine_rss: float = 270.0) -> Sample:
    return Sample(at, 80.0, engine_rss, 7, 16, 0.002, True)


def a_visit(at: float, ending: str, *, expected: bool, broken: bool = False) -> Visited:
    return Visited(at, "stream", ending, 0.2, 0.1, expected, broken)


def a_soak() -> Soak:
    soak = Soak(1800.0, kills=[100.0], back=[3.0], exit_code=0)
    soak.rests = [Rest(180.0 * leg, {}, 0.0, a_sample(180.0 * leg), 4) for leg in range(1, 11)]
    soak.samples = [rest.sample for rest in soak.rests]
    soak.visits = [a_visit(18.0 * number, "done", expected=True) for number in range(100)]
    soak.visits.append(a_visit(101.0, "error event", expected=False, broken=True))
    return soak


def an_end_without_excuse(soak: Soak) -> None:
    soak.visits.append(a_visit(900.0, "error event", expected=False))


def a_cut_stream_beside_a_killed_engine(soak: Soak) -> None:
    soak.visits.append(a_visit(101.0, "cut", expected=False, broken=True))


def a_block_left(soak: Soak) -> None:
    soak.rests[3].unsettled = {"vllm:kv_cache_usage_perc": 0.01}


def books_that_differ(soak: Soak) -> None:
    soak.rests[-1].books_differ = 1.0


def memory_that_grows(soak: Soak) -> None:
    for number, rest in enumerate(soak.rests):
        rest.sample = a_sample(rest.at, 270.0 + 5.0 * number)


def descriptors_that_grow(soak: Soak) -> None:
    soak.rests[-1].sample.num_fds = 60


def tasks_that_grow(soak: Soak) -> None:
    soak.rests[-1].num_tasks = 60


def an_engine_that_stays_away(soak: Soak) -> None:
    soak.back.clear()


def a_bad_end(soak: Soak) -> None:
    soak.exit_code = 1


def test_a_good_run_has_no_fault() -> None:
    assert faults(a_soak()) == []


@pytest.mark.parametrize(
    "spoil",
    [
        an_end_without_excuse,
        a_cut_stream_beside_a_killed_engine,
        a_block_left,
        books_that_differ,
        memory_that_grows,
        descriptors_that_grow,
        tasks_that_grow,
        an_engine_that_stays_away,
        a_bad_end,
    ],
)
def test_each_thing_that_must_not_be_is_found(spoil: Callable[[Soak], None]) -> None:
    soak = a_soak()
    spoil(soak)
    assert len(faults(soak)) == 1


def test_the_page_tells_ends_kills_and_slopes(tmp_path: Path) -> None:
    write(a_soak(), tmp_path, "On a machine of its own.")
    page = (tmp_path / "soak.md").read_text()
    for told in (
        "a machine of its own",
        "done 100, error event 1",
        "| engine killed at, s | 100 |",
    ):
        assert told in page
    assert page.count("\n| ") > 20
    assert (tmp_path / "images" / "soak.svg").stat().st_size > 1000
