"""Known traces give known numbers."""

from __future__ import annotations

import pytest

from service.bench.client import Trace
from service.bench.load import Level
from service.bench.summary import Spread, percentile, summarize


def trace(start: float, *chunks: float, tokens: int | None = None) -> Trace:
    return Trace(start, list(chunks), chunks[-1] + 0.5, len(chunks) if tokens is None else tokens)


def test_percentiles_lie_between_the_nearest_two() -> None:
    ordered = [float(number) for number in range(101)]
    assert [percentile(ordered, share) for share in (0.0, 0.5, 0.9, 0.99, 1.0)] == [
        0.0,
        50.0,
        90.0,
        99.0,
        100.0,
    ]
    assert percentile([1.0, 2.0], 0.5) == 1.5
    assert percentile([7.0], 0.99) == 7.0


def test_an_empty_spread_has_no_numbers() -> None:
    assert Spread.of([]) == Spread(None, None, None, None, None)


def test_known_traces() -> None:
    traces = [trace(0.0, 1.0, 1.1, 1.3), trace(1.0, 3.0, 3.1, 3.3, tokens=6)]
    found = summarize(Level("concurrency", 2), traces, seconds=4.0)
    assert (found.num_requests, found.num_good, found.num_refused) == (2, 2, 0)
    assert found.output_tokens == 9
    assert found.output_tokens_per_second == pytest.approx(2.25)
    assert found.requests_per_second == pytest.approx(0.5)
    assert found.ttft == Spread(1.5, 1.5, pytest.approx(1.9), pytest.approx(1.99), 2.0)
    assert found.itl.mean == pytest.approx(0.15)
    assert found.itl.longest == pytest.approx(0.2)
    # three tokens after the first chunk alone, and six whose pieces held several
    assert found.tpot.longest == pytest.approx(0.15)
    assert found.tpot.p50 == pytest.approx((0.15 + 0.06) / 2)
    assert found.e2e.p50 == pytest.approx((1.8 + 2.8) / 2)
    assert found.mean_in_flight == pytest.approx((1.8 + 2.8) / 4)


def test_failures_are_counted_by_kind_and_refusals_apart() -> None:
    bad = [trace(0.0, 1.0) for _ in range(5)]
    for one, kind, detail in zip(
        bad,
        ("refused", "http 500", "http 500", "timeout", "refused"),
        ("queue full", "first", "second", "slow", "again"),
        strict=True,
    ):
        one.fail(kind, detail)
    found = summarize(Level("rate", 2.0), [*bad, trace(0.0, 1.0)], 2.0)
    assert (found.num_good, found.num_refused, found.num_failed) == (1, 2, 3)
    assert found.failures == {"http 500": 2, "timeout": 1}
    assert found.examples["http 500"] == "first"
    assert found.output_tokens == 1, "tokens of answers that failed do not count"


def test_nothing_answered_is_no_division_by_zero() -> None:
    one = Trace(1.0, end=1.0)
    one.fail("connection")
    found = summarize(Level("concurrency", 1), [one], 0.0)
    assert found.output_tokens_per_second == 0.0
    assert found.ttft.p50 is None
