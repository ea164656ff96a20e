"""The book of connections: who gives way, who is one too many, whose reader is gone."""

from __future__ import annotations

import resource
import subprocess
import sys
from dataclasses import dataclass

import pytest

from service.http.connections import RESERVED, SPARE, Connections, Patience
from tests.running import ROOT


@dataclass(eq=False)
class Link:
    """A connection that remembers what it was told."""

    output: int = 0
    taken: int = 0
    gave_way: bool = False
    aborted: bool = False

    @property
    def has_output(self) -> bool:
        return self.output > 0

    def give_way(self) -> None:
        self.gave_way = True

    def abort(self) -> None:
        self.aborted = True

    def is_stalled(self, now: float, patience: float) -> bool:
        return self.has_output and not self.taken and patience == 0


def taken_in(book: Connections, count: int) -> list[Link]:
    links = [Link() for _ in range(count)]
    assert all(book.admit(link) for link in links)
    return links


def test_whoever_waits_longest_gives_way_to_a_newcomer() -> None:
    book = Connections(limit=3)
    first, second, third = taken_in(book, 3)
    book.answer(first)
    book.wait(first)  # its wait began anew
    taken_in(book, 1)
    assert [first.gave_way, second.gave_way, third.gave_way] == [False, True, False]
    taken_in(book, 2)
    assert [first.gave_way, third.gave_way] == [True, True]
    assert book.num_open == 3
    assert book.ended["gave_way"] == 3


def test_no_connection_that_is_being_answered_ever_gives_way() -> None:
    book = Connections(limit=2)
    busy = taken_in(book, 2)
    for link in busy:
        book.answer(link)
    extra = taken_in(book, SPARE + 50)
    assert not any(link.gave_way for link in busy)
    assert all(book.is_extra(link) for link in extra[-SPARE:])
    assert [link.gave_way for link in extra] == [True] * 50 + [False] * SPARE
    assert book.num_open == 2 + SPARE


def test_where_even_the_extra_ones_are_busy_there_is_no_room() -> None:
    book = Connections(limit=1)
    for _ in range(1 + SPARE):
        book.answer(*taken_in(book, 1))
    assert not book.admit(Link())
    assert book.ended["no_room"] == 1
    assert book.num_open == 1 + SPARE


def test_room_comes_back_with_every_connection_that_ends() -> None:
    book = Connections(limit=2)
    first, second = taken_in(book, 2)
    for link in (first, second):
        book.answer(link)
    (extra,) = taken_in(book, 1)
    assert book.is_extra(extra)
    book.forget(first)
    (newcomer,) = taken_in(book, 1)
    assert not book.is_extra(newcomer)
    for link in (second, extra, newcomer):
        book.forget(link)
    assert (book.num_open, book.num_waiting) == (0, 0)
    assert not book._writing


def test_a_reader_that_takes_nothing_is_ended_and_a_slow_one_is_not() -> None:
    book = Connections(patience=Patience(write=0))
    stalled, slow, idle = taken_in(book, 3)
    for link in (stalled, slow):
        book.answer(link)
        link.output = 10
    slow.taken = 1
    book.end_stalled()
    assert [stalled.aborted, slow.aborted, idle.aborted] == [True, False, False]
    assert book.ended["write_timeout"] == 1


def test_one_that_waits_with_its_last_answer_unread_is_still_watched() -> None:
    book = Connections(patience=Patience(write=0))
    (link,) = taken_in(book, 1)
    book.answer(link)
    link.output, link.taken = 10, 1
    book.wait(link)
    book.end_stalled()
    assert not link.aborted
    link.taken = 0
    book.end_stalled()
    assert link.aborted


LIMITS = """
import resource, sys
from service.http.connections import TooFewDescriptors, connection_limit
try:
    found = connection_limit(eval(sys.argv[1]))
except TooFewDescriptors as error:
    found = f"refused: {error}"
print(found, *resource.getrlimit(resource.RLIMIT_NOFILE))
"""


def limit_of(wanted: int | None, soft: int, hard: int) -> str:
    """What a process of these limits finds."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if most < hard:
        pytest.skip(f"this machine allows {most} descriptors")
    return subprocess.run(
        [sys.executable, "-c", LIMITS, repr(wanted)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard)),
    ).stdout.strip()


@pytest.mark.parametrize(
    ("wanted", "soft", "hard", "found"),
    [
        (None, 1024, 4096, f"{4096 - RESERVED} 4096 4096"),
        (None, 64, 128, "96 128 128"),
        (100, 1024, 4096, "100 1024 4096"),
        (2000, 1024, 4096, f"2000 {2000 + RESERVED} 4096"),
    ],
)
def test_descriptors_are_raised_as_far_as_needed_and_some_are_kept_for_files(
    wanted: int | None, soft: int, hard: int, found: str
) -> None:
    assert limit_of(wanted, soft, hard) == found


def test_more_connections_than_descriptors_are_refused_with_what_to_do() -> None:
    said = limit_of(4000, 1024, 4096)
    assert said.startswith("refused: max-connections 4000 needs 4256 file descriptors")
    assert "ulimit -n" in said
