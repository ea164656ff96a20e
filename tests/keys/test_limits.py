"""A key's limits under a fake clock: what is let in, what is refused, and for how long."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.errors import LimitReached, QuotaSpent, RateLimited
from service.keys.key import Key, hash_of
from service.keys.limits import Clocks, KeyLimits, Limits, Reservation, duration
from service.keys.spent import DAY, Spent, day_of, month_of

NOON = datetime(2026, 1, 30, 12, tzinfo=UTC).timestamp()


@dataclass
class Time:
    now: float = NOON

    def __call__(self) -> float:
        return self.now

    @property
    def clocks(self) -> Clocks:
        return Clocks(wall=self, steady=self)


@pytest.fixture
def time() -> Time:
    return Time()


def key(**fields: Any) -> Key:
    return Key(name="alice", sha256=hash_of("x"), **fields)


def limited(time: Time, **fields: Any) -> KeyLimits:
    return KeyLimits(key(**fields), time.clocks)


def refusal(limits: KeyLimits, tokens: int | None = None) -> RateLimited | None:
    """None where it is let in, and then ended at once without having used anything."""
    try:
        if tokens is None:
            limits.enter()
            limits.leave(1.0)
        else:
            limits.reserve(tokens).settle(0)
    except RateLimited as refused:
        return refused
    return None


def spend(limits: KeyLimits, tokens: int) -> None:
    limits.reserve(tokens).settle(tokens)


def assert_honest(time: Time, limits: KeyLimits, tokens: int | None = None) -> None:
    """The same request is let in at the moment it was told, and not a little before."""
    refused = refusal(limits, tokens)
    assert refused is not None
    assert refused.retry_after is not None
    told = time.now + refused.retry_after
    time.now = told - 0.001
    assert refusal(limits, tokens) is not None
    time.now = told
    assert refusal(limits, tokens) is None


def test_a_key_without_limits_is_never_refused(time: Time) -> None:
    limits = limited(time)
    for _ in range(1000):
        limits.enter()
        limits.reserve(10**9)
    assert list(limits.standings()) == []
    assert limits.most_tokens() is None


def test_requests_over_the_rate_wait_for_their_turn(time: Time) -> None:
    limits = limited(time, requests_per_minute=3)
    assert [refusal(limits) for _ in range(3)] == [None] * 3
    refused = refusal(limits)
    assert isinstance(refused, LimitReached)
    assert (refused.limit, refused.retry_after) == ("requests", pytest.approx(20))
    assert "try again in 20s" in refused.message
    assert_honest(time, limits)


def test_tokens_over_the_rate_wait_for_as_many_as_they_may_need(time: Time) -> None:
    limits = limited(time, tokens_per_minute=600)
    spend(limits, 500)
    assert refusal(limits, 100) is None
    refused = refusal(limits, 200)
    assert refused is not None
    assert (refused.limit, refused.retry_after) == ("tokens", pytest.approx(10))
    assert_honest(time, limits, 200)


def test_what_was_held_and_not_used_is_there_again(time: Time) -> None:
    limits = limited(time, tokens_per_minute=600, tokens_per_day=1000)
    reservation = limits.reserve(500)
    assert refusal(limits, 200) is not None
    reservation.settle(20)
    assert refusal(limits, 580) is None
    assert limits.most_tokens() == 600
    assert {one.name: one.remaining for one in limits.standings()} == {
        "tokens": 580,
        "tokens-day": 980,
    }


def test_what_could_never_be_let_in_is_told_so(time: Time) -> None:
    limits = limited(time, tokens_per_minute=600, tokens_per_month=5000)
    for tokens, limit in ((601, "tokens"), (5001, "tokens-month")):
        refused = refusal(limits, tokens)
        assert refused is not None
        assert refused.retry_after is None
        assert refused.limit in (limit, "tokens")  # both, of the larger one
        assert "max_tokens" in refused.message


def test_so_many_requests_at_a_time(time: Time) -> None:
    limits = limited(time, max_concurrency=2)
    limits.enter()
    limits.enter()
    refused = refusal(limits)
    assert refused is not None
    assert refused.limit == "concurrency"
    assert refused.retry_after is not None
    limits.leave(1.0)
    assert refusal(limits) is None


def test_a_request_refused_for_one_limit_takes_nothing_of_another(time: Time) -> None:
    limits = limited(time, max_concurrency=1, requests_per_minute=10, tokens_per_minute=60)
    limits.enter()
    for _ in range(5):
        assert refusal(limits) is not None
    assert next(one.remaining for one in limits.standings() if one.name == "requests") == 9
    assert refusal(limits, 61) is not None
    assert next(one.remaining for one in limits.standings() if one.name == "tokens") == 60


# ---- quotas


def test_a_days_quota_is_never_exceeded_and_comes_back_at_midnight(time: Time) -> None:
    limits = limited(time, tokens_per_day=1000)
    spend(limits, 900)
    refused = refusal(limits, 101)
    assert isinstance(refused, QuotaSpent)
    assert refused.retry_after == DAY / 2
    assert "100 are left" in refused.message
    assert limits.most_tokens() == 100
    assert refusal(limits, 100) is None
    assert_honest(time, limits, 101)
    assert limits.most_tokens() == 1000


def test_of_two_quotas_the_longer_wait_is_told(time: Time) -> None:
    limits = limited(time, tokens_per_day=1000, tokens_per_month=1500)
    spend(limits, 1000)
    time.now += DAY  # the 31st
    spend(limits, 500)
    refused = refusal(limits, 600)
    assert refused is not None
    assert refused.limit in ("tokens-day", "tokens-month")
    assert_honest(time, limits, 600)
    assert datetime.fromtimestamp(time.now, UTC).day == 1


def test_tokens_held_for_others_are_a_matter_of_moments_not_of_the_day(time: Time) -> None:
    limits = limited(time, tokens_per_day=1000)
    running = limits.reserve(900)
    refused = refusal(limits, 200)
    assert isinstance(refused, LimitReached)
    assert refused.retry_after is not None
    assert refused.retry_after < 60
    running.settle(10)
    assert refusal(limits, 200) is None


def test_quotas_begin_with_what_the_records_say(time: Time) -> None:
    asked = []

    def history(key_id: str, since: float) -> int:
        asked.append((key_id, since))
        return 300 if since == day_of(NOON).start else 4000

    limits = KeyLimits(key(tokens_per_day=1000, tokens_per_month=5000), time.clocks, history)
    assert {one.name: one.remaining for one in limits.standings()} == {
        "tokens-day": 700,
        "tokens-month": 1000,
    }
    spend(limits, 100)
    time.now += DAY
    assert {one.name: one.remaining for one in limits.standings()} == {
        "tokens-day": 1000,
        "tokens-month": 900,
    }
    assert asked == [(limits.key.id, day_of(NOON).start), (limits.key.id, month_of(NOON).start)]


def test_a_clock_that_jumps_finds_each_day_as_it_was_left(time: Time) -> None:
    limits = limited(time, tokens_per_day=1000)
    spend(limits, 800)
    for jump, left in ((DAY, 1000), (-DAY, 200), (40 * DAY, 1000), (-40 * DAY, 200)):
        time.now += jump
        assert limits.most_tokens() == left


def test_the_past_is_kept_for_a_month_and_no_longer() -> None:
    spent = Spent()
    for number in range(400):
        spent.add(1, NOON + number * DAY)
    assert len(spent._days) == 31
    december = datetime(2026, 12, 31, 23, 59, tzinfo=UTC).timestamp()
    window = month_of(december)
    assert window.end == datetime(2027, 1, 1, tzinfo=UTC).timestamp()
    assert window.start == datetime(2026, 12, 1, tzinfo=UTC).timestamp()


# ---- changes


def test_other_limits_begin_where_the_old_ones_stood(time: Time) -> None:
    limits = Limits(time.clocks)
    limits.install([key(tokens_per_minute=600, max_concurrency=1)])
    found = limits.of(key().id)
    assert found is not None
    found.enter()
    running = found.reserve(300)
    limits.install([key(tokens_per_minute=1200, max_concurrency=1)])
    assert limits.of(key().id) is found
    assert [(one.name, one.remaining) for one in found.standings()] == [
        ("tokens", 900),
        ("concurrency", 0),
    ]
    limits.install([key()])
    limits.install([key(tokens_per_minute=600)])
    running.settle(300)
    assert next(found.standings()).remaining == 600, "settled with the limit it was held under"
    limits.install([])
    assert limits.of(key().id) is None
    found.leave(1.0)


# ---- any order

orders = st.lists(
    st.one_of(
        st.tuples(st.just("wait"), st.sampled_from([0.0, 0.3, 5.0, 61.0, 5000.0, 90000.0])),
        st.tuples(st.just("enter"), st.none()),
        st.tuples(st.just("leave"), st.none()),
        st.tuples(st.just("reserve"), st.sampled_from([1, 40, 100, 101])),
        st.tuples(st.just("settle"), st.floats(0, 1)),
    ),
    max_size=100,
)


@settings(max_examples=200, deadline=None)
@given(orders)
def test_no_order_of_requests_exceeds_a_limit(order: list[tuple[str, Any]]) -> None:
    time = Time()
    limits = limited(
        time,
        max_concurrency=3,
        requests_per_minute=5,
        tokens_per_minute=100,
        tokens_per_day=250,
    )
    entered: list[float] = []
    running: list[tuple[Reservation, int]] = []
    spent: dict[float, int] = {}
    active = 0
    for what, value in order:
        if what == "wait":
            time.now += value
        elif what == "enter" and _is_let_in(limits.enter):
            active += 1
            entered.append(time.now)
        elif what == "leave" and active:
            active -= 1
            limits.leave(1.0)
        elif what == "reserve":
            try:
                running.append((limits.reserve(value), value))
            except RateLimited:
                continue
        elif what == "settle" and running:
            reservation, held = running.pop(0)
            used = int(value * held)
            reservation.settle(used)
            today = day_of(time.now).start
            spent[today] = spent.get(today, 0) + used
        assert active <= 3
        held_now = sum(held for _, held in running)
        today = spent.get(day_of(time.now).start, 0)
        assert today + held_now <= 250
    for first, start in enumerate(entered):
        for count, when in enumerate(entered[first:], start=1):
            assert count <= 5 * (1 + (when - start) / 60) + 1e-3


def _is_let_in(enter: Any) -> bool:
    try:
        enter()
    except RateLimited:
        return False
    return True


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0ms"),
        (0.0121, "13ms"),
        (0.9999, "1s"),
        (1, "1s"),
        (7.66, "7.66s"),
        (59.9999, "1m0s"),
        (60, "1m0s"),
        (360, "6m0s"),
        (90.5, "1m30.5s"),
        (3600, "1h0m0s"),
        (86_341, "23h59m1s"),
    ],
)
def test_durations_are_written_as_openai_writes_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text
    assert re.fullmatch(r"(\d+h)?(\d+m)?(\d+(\.\d+)?s)?|\d+ms", text)
