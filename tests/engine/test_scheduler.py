"""The scheduler's promises one by one. Pages are of 8 tokens, grains of 4; texts are checked."""

from __future__ import annotations

import pytest

from service.engine.blocks import BlockPool
from service.engine.drain_rate import DrainRate
from service.engine.messages import Output, SamplingSettings, Submit
from service.engine.scheduler import Scheduler
from service.engine.sequence import Sequence
from service.engine.step import Step, StepResult
from service.errors import ContextLengthExceeded, InvalidRequest, Overloaded
from tests.engine.recording_runner import RecordingRunner
from tests.engine.storm import Answer, Storm

PAGE, GRAIN = 8, 4


def a_storm(num_blocks: int = 40, seqs: int = 4, budget: int = 16, **fields: int) -> Storm:
    return Storm(BlockPool(num_blocks, PAGE, GRAIN), seqs, budget, **fields)


def ask(number: int, prompt: list[int] | int, max_tokens: int = 4, n: int = 1, **fields) -> Submit:  # type: ignore[no-untyped-def]
    tokens = [number] * prompt if isinstance(prompt, int) else prompt
    settings = [SamplingSettings(max_tokens=max_tokens, choice=i) for i in range(n)]
    return Submit(number, tokens, settings, **fields)


def next_step(storm: Storm) -> Step:
    storm.collect()
    storm.launch()
    assert storm.flight is not None
    return storm.flight[0]


def rows(step: Step) -> list[tuple[int, int, int]]:
    return [(row.sequence.id, row.start, row.count) for row in step.rows]


def first_output(storm: Storm, number: int) -> Output:
    return storm.answers[0, number].outputs[0]


def running(storm: Storm) -> list[Sequence]:
    return storm.scheduler._lineup.running


# ---- the budget --------------------------------------------------------------------------------


def test_nobody_here_means_no_step() -> None:
    assert a_storm().scheduler.schedule() is None


def test_a_long_prompt_is_computed_in_chunks_of_the_budget() -> None:
    storm = a_storm()
    storm.submit(ask(1, 40))
    assert [rows(next_step(storm)) for _ in range(4)] == [
        [(1, 0, 16)],
        [(1, 16, 16)],
        [(1, 32, 8)],
        [(1, 40, 1)],
    ]


def test_decodes_come_first_and_prompts_share_what_is_left() -> None:
    storm = a_storm()
    storm.submit(ask(1, 5))
    storm.run(2)
    storm.submit(ask(2, 10))
    storm.submit(ask(3, 10))
    assert rows(next_step(storm)) == [(1, 6, 1), (2, 0, 10), (3, 0, 5)]
    assert rows(next_step(storm)) == [(1, 7, 1), (2, 10, 1), (3, 5, 5)]
    storm.end()


def test_a_chunk_of_one_token_stands_among_the_decodes() -> None:
    storm = a_storm()
    storm.submit(ask(1, 15))
    storm.submit(ask(2, 2))
    assert rows(next_step(storm)) == [(2, 0, 1), (1, 0, 15)]


def test_decodes_leave_prompts_a_share_of_every_step() -> None:
    storm = a_storm(seqs=16, budget=16)
    for number in range(16):
        storm.submit(ask(number, 1, max_tokens=60))
    for _ in range(30):
        step = next_step(storm)
        assert storm.scheduler.gauges().running <= 8
    storm.submit(ask(99, 30, priority=-1))
    storm.cancel(0, 0, None)
    step = next_step(storm)
    assert (99, 0, 9) in rows(step)


def test_the_running_do_not_wait_for_prompts() -> None:
    storm = a_storm(num_blocks=60, budget=8)
    storm.submit(ask(1, 3, max_tokens=30))
    storm.run(2)
    for number in range(2, 6):
        storm.submit(ask(number, 40))
    for _ in range(20):
        assert next_step(storm).rows[0].sequence.id == 1


def test_a_better_priority_goes_before_a_prompt_under_way() -> None:
    storm = a_storm()
    storm.submit(ask(1, 40))
    next_step(storm)
    storm.submit(ask(2, 10, priority=-1))
    storm.submit(ask(3, 10))
    assert rows(next_step(storm)) == [(2, 0, 10), (1, 16, 6)]
    storm.end()


def test_no_more_than_two_steps_are_under_way() -> None:
    scheduler = a_storm().scheduler
    scheduler.add(ask(1, 5))
    assert scheduler.schedule() is not None
    assert scheduler.schedule() is not None
    with pytest.raises(AssertionError):
        scheduler.schedule()


# ---- prefixes ----------------------------------------------------------------------------------


def test_a_repeated_prompt_computes_one_token() -> None:
    storm = a_storm()
    storm.submit(ask(1, list(range(24)), max_tokens=1))
    storm.run(5)
    storm.submit(ask(2, list(range(24)), max_tokens=1))
    step = next_step(storm)
    assert rows(step) == [(2, 23, 1)]
    assert [tokens for _, _, tokens in step.copies] == [7]
    storm.end()
    assert first_output(storm, 2).cached_tokens == 23
    assert storm.scheduler.counters.prefix_hits == 23
    assert storm.scheduler.counters.prefix_queries == 48


def test_requests_at_the_same_time_share_what_one_has_computed() -> None:
    storm = a_storm()
    storm.submit(ask(1, list(range(30))))
    storm.submit(ask(2, [*range(22), 50, 51]))
    assert rows(next_step(storm)) == [(1, 0, 16)]
    step = next_step(storm)
    assert rows(step) == [(1, 16, 14), (2, 16, 2)]
    first, second = running(storm)
    assert first.block_table[:2] == second.block_table[:2]
    assert first.block_table[2] != second.block_table[2]
    storm.end()


def test_part_of_a_page_is_copied_and_not_shared() -> None:
    storm = a_storm()
    storm.submit(ask(1, list(range(15))))
    storm.run(2)
    storm.submit(ask(2, [*range(13), 50, 51]))
    step = next_step(storm)
    first, second = running(storm)
    assert step.copies == [(first.block_table[1], second.block_table[1], 4)]
    assert (2, 12, 3) in rows(step)
    storm.end()


def test_a_page_copied_from_is_kept_longer_than_one_not_asked_for() -> None:
    """Five blocks: two cached pages; the copy needs one more than is free without them."""
    storm = a_storm(num_blocks=6)
    wanted, unwanted = list(range(7)), list(range(20, 27))
    for number, prompt in enumerate([wanted, unwanted]):
        storm.submit(ask(number, prompt, max_tokens=1))
        storm.end()
    storm.submit(ask(2, [*wanted[:6], *range(40, 66)], max_tokens=1))
    storm.end()
    assert first_output(storm, 2).cached_tokens == 4
    storm.submit(ask(3, unwanted, max_tokens=1))
    storm.end()
    assert first_output(storm, 3).cached_tokens == 0


def test_grains_copied_are_known_again_once_their_source_is_evicted() -> None:
    storm = a_storm(num_blocks=3)
    storm.submit(ask(1, list(range(5)), max_tokens=1))
    storm.end()
    storm.submit(ask(2, [*range(4), *range(40, 51)], max_tokens=1))  # fills the pool
    storm.end()
    storm.submit(ask(3, list(range(5)), max_tokens=1))
    storm.end()
    assert first_output(storm, 2).cached_tokens == 4
    assert first_output(storm, 3).cached_tokens == 4


def test_namespaces_share_nothing() -> None:
    storm = a_storm()
    storm.submit(ask(1, list(range(16)), namespace=b"a"))
    storm.run(9)
    storm.submit(ask(2, list(range(16)), namespace=b"b"))
    storm.end()
    assert first_output(storm, 2).cached_tokens == 0


def test_what_was_said_is_cached_for_the_next_turn() -> None:
    storm = a_storm()
    storm.submit(ask(1, list(range(10)), max_tokens=7))
    storm.end()
    turn = [*range(10), *storm.answers[0, 1].tokens[0], 40, 41]
    storm.submit(ask(2, turn))
    storm.end()
    assert first_output(storm, 2).cached_tokens == 16


def test_prompt_logprobs_read_no_cached_page_but_fill_them() -> None:
    storm = a_storm()
    for number in (1, 2):
        storm.submit(ask(number, list(range(20)), prompt_logprobs=0))
        storm.end()
        assert first_output(storm, number).cached_tokens == 0
    storm.submit(ask(3, list(range(20))))
    storm.end()
    assert first_output(storm, 3).cached_tokens == 19
    assert storm.scheduler.counters.prefix_queries == 20


# ---- choices -----------------------------------------------------------------------------------


def test_choices_share_the_prompt_and_copy_before_they_write() -> None:
    storm = a_storm()
    storm.submit(ask(1, list(range(13)), n=3, max_tokens=9))
    assert rows(next_step(storm)) == [(1, 0, 13)]
    step = next_step(storm)
    assert rows(step) == [(1, 13, 1)] * 3
    shared, copied = [sequence.block_table for sequence in running(storm)][2], step.copies
    assert copied == [(shared[1], s.block_table[1], 5) for s in running(storm)[:2]]
    assert len({s.block_table[0] for s in running(storm)}) == 1
    storm.end()
    assert storm.scheduler.counters.prompt_tokens == 13


def test_choices_at_the_end_of_a_page_need_no_copy() -> None:
    storm = a_storm()
    storm.submit(ask(1, list(range(16)), n=2))
    next_step(storm)
    assert next_step(storm).copies == []
    storm.end()


@pytest.mark.parametrize("seqs", [1, 2, 3])
def test_more_choices_than_may_run_are_all_answered(seqs: int) -> None:
    storm = a_storm(seqs=seqs)
    storm.submit(ask(1, 13, n=8, max_tokens=6))
    storm.end()
    assert len(storm.answers[0, 1].endings) == 8


def test_choices_beyond_the_slots_find_their_prompt_cached() -> None:
    storm = a_storm(seqs=1)
    storm.submit(ask(1, list(range(24)), n=3, max_tokens=3))
    storm.run(4)
    step = next_step(storm)
    assert rows(step) == [(1, 24, 1)]
    storm.end()


def test_only_the_first_output_of_all_choices_tells_of_the_prompt() -> None:
    storm = a_storm()
    storm.submit(ask(1, 13, n=3))
    storm.end()
    told = [output for output in storm.answers[0, 1].outputs if output.queue_time is not None]
    assert [output.choice for output in told] == [0]


def test_no_token_asked_for_is_an_answer_without_one() -> None:
    storm = a_storm()
    storm.submit(ask(1, 20, max_tokens=0, n=2, prompt_logprobs=0))
    storm.end()
    answer = storm.answers[0, 1]
    assert [output.tokens for output in answer.outputs] == [[], []]
    assert [output.finish_reason for output in answer.outputs] == ["length", "length"]
    assert len(answer.outputs[0].prompt_logprobs or []) == 20


def test_a_choice_cancelled_in_flight_does_not_take_its_neighbours_draw() -> None:
    storm = a_storm()
    settings = [SamplingSettings(max_tokens=0), SamplingSettings(max_tokens=3, choice=1)]
    storm.submit(Submit(1, [1] * 5, settings))
    storm.launch()
    storm.cancel(0, 1, 1)
    storm.end()
    assert storm.answers[0, 1].tokens[0] == []
    assert storm.scheduler.counters.discarded_tokens == 1


# ---- memory runs out ---------------------------------------------------------------------------


def test_the_youngest_is_preempted_and_recomputes_the_same_text() -> None:
    storm = a_storm(num_blocks=7)
    for number in (1, 2):
        storm.submit(ask(number, 7, max_tokens=28))
    while not storm.scheduler.counters.preemptions:
        step = next_step(storm)
    assert [row.sequence.id for row in step.rows] == [1]
    assert storm.scheduler.gauges()[:3] == (1, 1, 0)
    storm.end()
    assert storm.scheduler.counters.preemptions == 1


def test_the_lowest_priority_is_preempted_before_the_youngest() -> None:
    storm = a_storm(num_blocks=7)
    storm.submit(ask(1, 7, max_tokens=28, priority=1))
    storm.submit(ask(2, 7, max_tokens=28))
    while not storm.scheduler.counters.preemptions:
        step = next_step(storm)
    assert [row.sequence.id for row in step.rows] == [2]
    storm.end()


def test_the_preempted_goes_before_those_that_never_ran() -> None:
    storm = a_storm(num_blocks=7, seqs=2)
    for number in (1, 2, 3):
        storm.submit(ask(number, 7, max_tokens=28 if number < 3 else 1))
    while not storm.scheduler.counters.preemptions:
        next_step(storm)
    head = storm.scheduler._waiting.peek()
    assert head is not None
    assert head.id == 2
    storm.end()


def test_nobody_is_admitted_into_blocks_that_the_running_want_at_once() -> None:
    storm = a_storm(num_blocks=4)
    storm.submit(ask(1, 5, max_tokens=18))
    next_step(storm)
    storm.submit(ask(2, 9, max_tokens=6))
    storm.end()
    assert storm.scheduler.counters.preemptions == 0


def test_a_sequence_alone_may_fill_the_whole_pool() -> None:
    storm = a_storm(num_blocks=6)
    storm.submit(ask(1, list(range(30)), max_tokens=11))
    storm.end()
    storm.submit(ask(2, [*range(29), 49], max_tokens=11))
    storm.end()
    assert storm.scheduler.counters.preemptions == 0
    assert first_output(storm, 2).cached_tokens == 28


def test_prompt_logprobs_survive_preemption_and_are_computed_once() -> None:
    storm = a_storm(num_blocks=8, budget=4)
    storm.submit(ask(1, 7, max_tokens=40))
    storm.run(3)
    storm.submit(ask(2, 33, prompt_logprobs=0))
    targets = targets_of(storm, 2)
    assert storm.scheduler.counters.preemptions == 1
    assert sum(targets) == 32
    storm.end()


def test_prompt_logprobs_half_known_are_asked_for_from_there() -> None:
    """Preempted in the middle of its prompt, its pages evicted: computes all, asks for the rest."""
    pool = BlockPool(8, PAGE, GRAIN, enable_prefix_caching=False)
    storm = Storm(pool, 4, 4)
    storm.submit(ask(1, 7, max_tokens=16))
    storm.run(3)
    storm.submit(ask(2, 33, prompt_logprobs=0))
    targets = targets_of(storm, 2)
    assert storm.scheduler.counters.preemptions == 1
    assert sum(targets) == 32
    assert 0 in targets[:-4]
    storm.end()


def targets_of(storm: Storm, number: int) -> list[int]:
    """Until the end of all: how many prompt logprobs each row of one request was asked for."""
    targets = []
    while storm.scheduler.has_work:
        storm.launch()
        assert storm.flight is not None
        step, _ = storm.flight
        targets += [row.num_targets for row in step.rows if row.sequence.id == number]
        storm.collect()
    return targets


# ---- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "param"), [(70, 11, "max_tokens"), (81, 1, "prompt")]
)
def test_what_exceeds_the_context_is_told_both_numbers(
    prompt: int, max_tokens: int, param: str
) -> None:
    scheduler = a_storm().scheduler
    with pytest.raises(ContextLengthExceeded, match=f"{prompt} .*{max_tokens} .*80") as refusal:
        scheduler.add(ask(1, prompt, max_tokens))
    assert refusal.value.param == param
    assert scheduler.counters.rejected == {"context_length_exceeded": 1}


def test_what_exceeds_the_pool_is_refused_and_what_just_fits_is_not() -> None:
    storm = a_storm(num_blocks=5)
    with pytest.raises(ContextLengthExceeded, match="5 cache blocks, and there are 4 of 8"):
        storm.scheduler.add(ask(1, 20, 14))
    assert storm.submit(ask(2, 20, 13))
    storm.end()


def test_no_prompt_no_choice_and_no_second_request_of_an_id() -> None:
    scheduler = a_storm().scheduler
    with pytest.raises(InvalidRequest):
        scheduler.add(ask(1, []))
    with pytest.raises(InvalidRequest):
        scheduler.add(ask(1, 5, n=0))
    scheduler.add(ask(1, 5))
    scheduler.add(ask(1, 5), client=7)
    with pytest.raises(InvalidRequest):
        scheduler.add(ask(1, 5))


def test_a_full_queue_refuses_and_says_when_to_come_again() -> None:
    storm = a_storm(seqs=1, max_queued_requests=2)
    for number in range(3):  # one to run, two to wait
        assert storm.submit(ask(number, 5))
    with pytest.raises(Overloaded) as refusal:
        storm.scheduler.add(ask(3, 5))
    assert refusal.value.retry_after is not None
    storm.run(1)
    assert not storm.submit(ask(4, 5))
    storm.end()
    assert storm.scheduler.counters.rejected == {"queue_full": 2}


def test_choices_count_as_sequences_in_the_queue() -> None:
    storm = a_storm(seqs=1, max_queued_requests=4)
    storm.submit(ask(1, 5, n=3))
    assert not storm.submit(ask(2, 5, n=3))
    assert storm.submit(ask(3, 5, n=2))


def test_waiting_prompt_tokens_are_bounded() -> None:
    storm = a_storm(seqs=1, max_queued_tokens=60)
    assert storm.submit(ask(1, 70))  # nobody waits: anything that can run
    storm.run(1)
    assert storm.scheduler.gauges().waiting_tokens == 0
    assert storm.submit(ask(2, 40))
    assert not storm.submit(ask(3, 40))
    assert storm.scheduler.gauges().waiting_tokens == 40


def test_the_wait_follows_the_measured_rate() -> None:
    fast, slow = DrainRate(), DrainRate()
    for second in range(100):
        fast.observe(second, num_finished=50, num_tokens=5000)
        slow.observe(second, num_finished=1, num_tokens=5000)
    assert fast.seconds_for(500, 0) == pytest.approx(10, rel=0.1)
    assert slow.seconds_for(30, 0) == pytest.approx(30, rel=0.1)
    assert slow.seconds_for(0, 100_000) == pytest.approx(20, rel=0.1)
    assert (slow.seconds_for(1e6, 0), fast.seconds_for(1, 1)) == (60, 1)


def test_idle_time_does_not_slow_the_rate() -> None:
    rate = DrainRate()
    for second in range(100):
        rate.observe(second, num_finished=10, num_tokens=100)
    before = rate.seconds_for(100, 0)
    rate.pause()
    rate.start(10_000)
    rate.observe(10_001, num_finished=10, num_tokens=100)
    assert rate.seconds_for(100, 0) == pytest.approx(before, rel=0.05)


# ---- out of time, cancelled, failed ------------------------------------------------------------


def test_past_its_deadline_a_request_keeps_what_it_said() -> None:
    storm = a_storm()
    storm.submit(ask(1, 5, max_tokens=60, deadline=1.0))
    storm.run(5)
    storm.let_time_pass(1.0)
    ending = storm.answers[0, 1].endings[0]
    assert (ending.finish_reason, ending.stop_reason) == ("length", "deadline")
    assert len(storm.answers[0, 1].tokens[0]) == 4
    storm.end()


def test_every_choice_ends_at_the_deadline_forked_or_not() -> None:
    storm = a_storm(budget=4)
    storm.submit(ask(1, 30, n=3, deadline=1.0))
    storm.run(1)
    storm.let_time_pass(2.0)
    assert storm.answers[0, 1].endings.keys() == {0, 1, 2}
    storm.end()


def test_max_queue_bounds_the_wait_for_the_first_step_only() -> None:
    storm = a_storm(seqs=1)
    storm.submit(ask(1, 5, max_tokens=50, max_queue=1.0))
    storm.submit(ask(2, 5, max_queue=1.0))
    storm.run(3)
    storm.let_time_pass(2.0)
    assert storm.answers[0, 1].endings == {}
    ended = storm.answers[0, 2].endings[0]
    assert (ended.tokens, ended.finish_reason, ended.stop_reason) == ([], "length", "deadline")
    assert ended.queue_time == pytest.approx(2.02)
    assert ended.prefill_time is None
    storm.end()


@pytest.mark.parametrize("steps", range(8))
@pytest.mark.parametrize("choice", [None, 0, 1])
@pytest.mark.parametrize("in_flight", [True, False])
def test_cancelling_works_in_any_state(steps: int, choice: int | None, in_flight: bool) -> None:
    storm = a_storm(seqs=2, budget=6)
    storm.submit(ask(1, 14, n=3, max_tokens=5))
    storm.submit(ask(2, 14))
    storm.run(steps)
    if not in_flight:
        storm.collect()
    storm.cancel(0, 1, choice)
    storm.check()
    storm.end()


def test_a_cancelled_request_keeps_its_blocks_until_its_step_is_back() -> None:
    storm = a_storm()
    storm.submit(ask(1, 20))
    storm.run(3)
    assert storm.flight is not None
    storm.cancel(0, 1, None)
    assert storm.pool.num_free == storm.pool.num_usable - 3
    storm.collect()
    assert storm.pool.num_free == storm.pool.num_usable
    assert storm.scheduler.counters.discarded_tokens == 1
    assert storm.scheduler.counters.finished == {"cancelled": 1}


def test_a_lost_connection_cancels_what_it_owns() -> None:
    storm = a_storm()
    for client in (0, 1):
        storm.submit(ask(1, 5), client)
        storm.submit(ask(2, 5), client)
    storm.run(2)
    storm.lose_connection(1)
    storm.end()
    assert storm.answers[0, 1].endings.keys() == {0}
    assert storm.answers[1, 1].endings == {}


def test_a_failed_row_ends_its_sequence_alone() -> None:
    storm = a_storm()
    for number in (1, 2):
        storm.submit(ask(number, 5))
    storm.run(2)
    storm.collect(failing=1)
    ending = storm.answers[0, 2].endings[0]
    assert (ending.finish_reason, ending.error) == ("error", "not finite")
    storm.end()
    assert storm.answers[0, 1].endings[0].finish_reason == "length"


def test_what_failed_is_not_read_again_from_the_cache() -> None:
    storm = a_storm()
    storm.submit(ask(1, 16))
    storm.run(3)
    storm.collect(failing=0)
    storm.submit(ask(2, [1] * 16))
    storm.end()
    assert first_output(storm, 2).cached_tokens == 0


def test_a_failed_prompt_ends_all_its_choices() -> None:
    storm = a_storm()
    storm.submit(ask(1, 5, n=3))
    storm.launch()
    storm.collect(failing=0)
    assert {ending.finish_reason for ending in endings(storm.answers[0, 1])} == {"error"}
    storm.end()


def test_a_failed_step_ends_everyone_in_it_and_nobody_else() -> None:
    storm = a_storm(seqs=1)
    storm.submit(ask(1, 5))
    storm.submit(ask(2, 5))
    step = storm.scheduler.schedule()
    assert step is not None
    storm._deliver(storm.scheduler.update(step, StepResult.failed(step, "the device failed")))
    storm.end()
    assert [e.finish_reason for e in endings(storm.answers[0, 1])] == ["error"]
    assert [e.finish_reason for e in endings(storm.answers[0, 2])] == ["length"]


def endings(answer: Answer) -> list[Output]:
    return list(answer.endings.values())


def test_one_message_a_client_a_step() -> None:
    pool = BlockPool(40, PAGE, GRAIN)
    scheduler = Scheduler(pool, max_num_seqs=4, max_num_batched_tokens=64, max_model_len=80)
    for client in "ab":
        for number in (1, 2):
            scheduler.add(ask(number, 5), client)
    step = scheduler.schedule()
    assert step is not None
    deliveries = scheduler.update(step, RecordingRunner(pool).run(step))
    assert {c: [o.id for o in outputs] for c, outputs in deliveries.items()} == {
        "a": [1, 2],
        "b": [1, 2],
    }
