"""Figures are differences of counters, and quantiles of what histograms grew by."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from service.top.figures import Figures, KeyFigures, figures, quantile
from service.top.scrape import Readiness, Sample, _series, plain
from service.top.screen import MOST_KEYS, bar, duration, merged, screen, sparkline

BEFORE = """
# TYPE pronk:num_requests_running gauge
pronk:num_requests_running{model_name="m",engine="0"} 1
pronk:generation_tokens_total{model_name="m",engine="0"} 100
pronk:prompt_tokens_total{model_name="m",engine="0"} 1000
pronk:prefix_cache_queries_total{model_name="m",engine="0"} 0
pronk:prefix_cache_hits_total{model_name="m",engine="0"} 0
pronk:key_generation_tokens_total{key="a"} 10
pronk:key_requests_total{key="a",outcome="finished"} 1
pronk:time_to_first_token_seconds_bucket{model_name="m",engine="0",le="0.1"} 100
pronk:time_to_first_token_seconds_bucket{model_name="m",engine="0",le="0.2"} 100
pronk:time_to_first_token_seconds_bucket{model_name="m",engine="0",le="+Inf"} 100
pronk:request_queue_time_seconds_sum{model_name="m",engine="0"} 5
pronk:request_queue_time_seconds_count{model_name="m",engine="0"} 5
"""
AFTER = """
pronk:num_requests_running{model_name="m",engine="0"} 3
pronk:num_requests_waiting{model_name="m",engine="0"} 4
pronk:waiting_prompt_tokens{model_name="m",engine="0"} 400
pronk:kv_cache_usage_perc{model_name="m",engine="0"} 0.25
pronk:kv_cache_usage_perc{model_name="m",engine="1"} 0.75
pronk:generation_tokens_total{model_name="m",engine="0"} 300
pronk:prompt_tokens_total{model_name="m",engine="0"} 5000
pronk:prefix_cache_queries_total{model_name="m",engine="0"} 400
pronk:prefix_cache_hits_total{model_name="m",engine="0"} 100
pronk:admission_rejections_total{model_name="m",engine="0",reason="queue_full"} 7
pronk:admission_rejections_total{model_name="m",engine="0",reason="loading"} 0
pronk:key_rejections_total{key="b",reason="requests"} 2
pronk:engine_restarts_total{model_name="m",engine="0",reason="killed"} 1
pronk:key_generation_tokens_total{key="a"} 110
pronk:key_requests_total{key="a",outcome="finished"} 5
pronk:key_requests_total{key="a",outcome="failed"} 1
pronk:time_to_first_token_seconds_bucket{model_name="m",engine="0",le="0.1"} 110
pronk:time_to_first_token_seconds_bucket{model_name="m",engine="0",le="0.2"} 120
pronk:time_to_first_token_seconds_bucket{model_name="m",engine="0",le="+Inf"} 120
pronk:request_queue_time_seconds_sum{model_name="m",engine="0"} 6
pronk:request_queue_time_seconds_count{model_name="m",engine="0"} 9
vllm:num_requests_running{model_name="m",engine="0"} 99
"""
READY = Readiness(True, "ready")


def sample(text: str, moment: float) -> Sample:
    return Sample(moment, READY, _series(text, "here"))


def both() -> Figures:
    return figures("u", [sample(BEFORE, 10), sample(AFTER, 12)])


def test_gauges_are_the_newest_and_rates_are_a_second() -> None:
    found = both()
    assert (found.running, found.waiting, found.waiting_tokens) == (3, 4, 400)
    assert found.kv_usage == 0.75, "of the fullest engine"
    assert (found.generation_rate, found.prompt_rate) == (100, 2000)
    assert found.prefix_hit_rate == 0.25
    assert found.models == ["m"]


def test_quantiles_are_of_what_was_observed_between_the_samples() -> None:
    found = both().first_token  # 10 below 0.1 s, 10 between 0.1 and 0.2
    assert found.p50 == pytest.approx(0.1)
    assert found.p95 == pytest.approx(0.19)
    assert both().queue_mean == 0.25
    assert figures("u", [sample(AFTER, 1), sample(AFTER, 2)]).first_token.p50 is None


def test_refusals_and_restarts_are_told_with_their_reasons() -> None:
    found = both()
    assert found.rejections == {"queue_full": 7, "requests": 2}
    assert found.rejection_rate == 4.5
    assert found.restarts == {"killed": 1}


def test_keys_have_their_own_rates_the_busiest_first() -> None:
    a, b = both().keys
    assert a == KeyFigures("a", 6, 0, 2.5, 0.0, 50.0)
    assert b == KeyFigures("b", 0, 2, 0.0, 0.0, 0.0)
    assert merged([both(), both()])[0] == KeyFigures("a", 12, 0, 5.0, 0.0, 100.0)


def test_counters_that_fell_began_anew_with_the_server() -> None:
    found = figures("u", [sample(AFTER, 10), sample(BEFORE, 12)])
    assert found.generation_rate == 50
    assert found.first_token.p50 == pytest.approx(0.05)


def test_one_sample_has_no_rates_yet() -> None:
    found = figures("u", [sample(AFTER, 10)])
    assert found.generation_rate == 0
    assert found.prefix_hit_rate is None
    assert found.running == 3


@pytest.mark.parametrize(
    ("buckets", "share", "found"),
    [
        ([], 0.5, None),
        ([(1.0, 0.0), (float("inf"), 0.0)], 0.5, None),
        ([(1.0, 4.0), (float("inf"), 4.0)], 0.5, 0.5),
        ([(1.0, 0.0), (2.0, 4.0), (float("inf"), 4.0)], 0.5, 1.5),
        ([(1.0, 1.0), (float("inf"), 4.0)], 0.95, 1.0),  # past the last bound: that bound
        ([(2.0, 4.0), (1.0, 0.0), (float("inf"), 4.0)], 1.0, 2.0),  # in any order
    ],
)
def test_quantiles_are_prometheus(buckets: list, share: float, found: float | None) -> None:
    assert quantile(share, buckets) == found


def drawn(servers: list[Figures], width: int = 80) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(screen(servers, {"u": [(1, 2), (3, 4)]}, 60))
    return console.export_text()


def test_the_screen_fits_eighty_columns_and_shows_what_matters() -> None:
    told = drawn([both()])
    assert max(map(len, told.splitlines())) <= 80
    for word in ("● ready", "75%", "100 tok/s", "190 ms", "queue_full 7", "killed 1", "400 tokens"):
        assert word in told, word


def test_histories_are_cut_at_their_old_end() -> None:
    found = both()
    for width, room in ((80, 8), (200, 24)):
        console = Console(width=width, file=io.StringIO())
        console.print(screen([found], {"u": [(0.0, 0.0)] * 90 + [(5.0, 5.0)]}, 60))
        told = console.file.getvalue()  # type: ignore[attr-defined]
        [line] = [line for line in told.splitlines() if line.startswith("│ running")]
        assert "▁█" in line
        assert line.count("▁") >= room - 3


def test_several_servers_are_summed_and_a_lost_one_is_shown_as_lost() -> None:
    lost = Figures("v", trouble="v cannot be reached: refused")
    told = drawn([both(), lost])
    assert "2 servers, 1 ready" in told
    assert "● unreachable" in told
    assert "v cannot be reached: refused" in told


def test_names_drive_no_terminal_and_are_no_markup() -> None:
    text = AFTER.replace('key="a"', 'key="[red]\x1b[31mx"')
    told = drawn([figures("u", [sample(text, 1)])])
    assert "[red]" in told
    assert "\x1b" not in told
    assert plain("a\x1b]0;title\x07b\n") == "a�]0;title�b�"


def test_many_keys_leave_room_for_the_rest() -> None:
    lines = "".join(
        f'pronk:key_requests_total{{key="k{n}",outcome="finished"}} 1\n' for n in range(99)
    )
    told = drawn([figures("u", [sample(lines, 1)])])
    assert len(re.findall(r"\bk\d", told)) == MOST_KEYS
    assert f"and {99 - MOST_KEYS} more" in told


def test_small_things_are_drawn_as_they_should_be() -> None:
    assert bar(0.5, 4).plain == "██░░ 50%"
    assert bar(7, 4).plain == "████ 100%"
    assert sparkline([0, 1, 8]) == "▁▂█"
    assert sparkline([0, 0]) == ""
    assert [*map(duration, (0.00512, 0.25, 1.234, 250))] == ["5.12 ms", "250 ms", "1.2 s", "250 s"]
