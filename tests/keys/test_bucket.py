"""No order of requests, refunds and clocks gets more out of a bucket than it may give."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.keys.bucket import Bucket, Hold

CAPACITY, PERIOD = 100, 60.0
SLACK = 1e-3

Used = list[tuple[float, float]]  # (when it was let in, how much it used)

asked = st.tuples(st.sampled_from([1, 30, 50, 100, 130]), st.sampled_from([0, 1, 50, 100]))
steps = st.lists(
    st.one_of(
        st.tuples(st.just("wait"), st.sampled_from([0.0, 0.1, 1.0, 7.0, 30.0, 60.0, 200.0])),
        st.tuples(st.just("ask"), asked),
        st.tuples(st.just("settle"), st.integers(0, 10)),
    ),
    max_size=80,
)


def play(script: list[tuple[str, object]]) -> tuple[Used, float, float]:
    """Let a bucket decide: what each request used, counted when it was let in; the level once all
    have settled, and when that was."""
    bucket, now, used, open_holds = Bucket(CAPACITY, 0.0, PERIOD), 0.0, [], []
    for what, value in script:
        if what == "wait":
            now += value  # type: ignore[operator]
        elif what == "ask":
            held, wanted = value  # type: ignore[misc]
            if bucket.wait(held, now) == 0:
                open_holds.append((bucket.hold(held, now), min(held, wanted)))
                used.append((now, min(held, wanted)))
        elif open_holds:
            hold, actual = open_holds.pop(value % len(open_holds))  # type: ignore[operator]
            hold.settle(actual, now)
    for hold, actual in open_holds:
        hold.settle(actual, now)
    return used, bucket.level(now), now


def assert_bounded(used: Used) -> None:
    """In every span of time, also one that begins late."""
    for first, (start, _) in enumerate(used):
        total = 0.0
        for when, amount in used[first:]:
            total += amount
            assert total <= CAPACITY * (1 + (when - start) / PERIOD) + SLACK, (start, when)


@settings(max_examples=400, deadline=None)
@given(steps)
def test_no_interleaving_exceeds_the_bucket_in_any_span(script: list[tuple[str, object]]) -> None:
    used, _, _ = play(script)
    assert_bounded(used)


@settings(max_examples=400, deadline=None)
@given(steps)
def test_in_the_end_it_is_as_if_each_had_taken_what_it_used(
    script: list[tuple[str, object]],
) -> None:
    used, level, now = play(script)
    plain = Bucket(CAPACITY, 0.0, PERIOD)
    for when, amount in used:
        plain.take(amount, when)
    assert level == pytest.approx(plain.level(now), abs=SLACK)


def test_a_late_refund_gives_back_nothing_that_refilled_already() -> None:
    bucket = Bucket(CAPACITY, 0.0, PERIOD)
    first = bucket.hold(100, 0.0)
    assert bucket.wait(100, 60.0) == 0, "refilled though the first request still runs"
    second = bucket.hold(100, 60.0)
    first.settle(0, 60.0)
    assert bucket.level(60.0) == 0
    second.settle(40, 60.0)
    assert bucket.level(60.0) == pytest.approx(60)


def test_a_quick_refund_gives_back_all_of_it() -> None:
    bucket = Bucket(CAPACITY, 0.0, PERIOD)
    holds = [bucket.hold(25, 0.0) for _ in range(4)]
    for hold in holds:
        hold.settle(5, 0.0)
    assert bucket.level(0.0) == pytest.approx(80)


def test_the_wait_it_tells_is_the_moment_it_lets_in() -> None:
    bucket = Bucket(CAPACITY, 0.0, PERIOD)
    bucket.take(90, 0.0)
    wait = bucket.wait(40, 0.0)
    assert wait == pytest.approx(18)
    assert bucket.wait(40, wait - 0.01) > 0
    assert bucket.wait(40, wait) == 0


def test_what_is_larger_than_the_bucket_waits_for_ever() -> None:
    assert math.isinf(Bucket(CAPACITY, 0.0, PERIOD).wait(101, 0.0))


def test_a_clock_that_goes_back_gives_nothing() -> None:
    bucket = Bucket(CAPACITY, 1000.0, PERIOD)
    bucket.take(100, 1000.0)
    assert bucket.level(0.0) == 0
    assert bucket.level(1000.0) == 0
    assert bucket.level(1030.0) == pytest.approx(50)


def test_more_used_than_held_is_paid_before_anything_is_let_in() -> None:
    bucket = Bucket(CAPACITY, 0.0, PERIOD)
    bucket.hold(100, 0.0).settle(150, 0.0)
    assert bucket.level(0.0) == pytest.approx(-50)
    assert bucket.wait(1, 0.0) == pytest.approx(30.6)


@pytest.mark.parametrize(("capacity", "level"), [(200, 140), (50, -10)])
def test_what_was_used_stays_used_when_the_size_changes(capacity: int, level: float) -> None:
    bucket = Bucket(CAPACITY, 0.0, PERIOD)
    hold: Hold = bucket.hold(60, 0.0)
    bucket.resize(capacity, 0.0)
    assert bucket.level(0.0) == pytest.approx(level)
    hold.settle(0, 0.0)
    assert bucket.level(0.0) == pytest.approx(capacity)
    assert bucket.seconds_to_full(0.0) == pytest.approx(0)
