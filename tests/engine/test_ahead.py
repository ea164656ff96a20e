"""What may run ahead of the step under way, and what becomes of it when that one is back."""

from __future__ import annotations

import pytest

from service.engine.blocks import BlockPool
from service.engine.messages import SamplingSettings, Submit
from service.engine.step import Step
from tests.engine.recording_runner import expected_text
from tests.engine.storm import MAX_MODEL_LEN, Storm

PAGE, GRAIN = 8, 4
PROMPT = list(range(4, 17))


def a_storm(num_blocks: int = 40, budget: int = 32, **fields: object) -> Storm:
    return Storm(BlockPool(num_blocks, PAGE, GRAIN), 4, budget, ahead=True, **fields)  # type: ignore[arg-type]


def ask(number: int, max_tokens: int = 6, prompt: list[int] = PROMPT, **fields: object) -> Submit:
    return Submit(number, prompt, [SamplingSettings(max_tokens=max_tokens, **fields)])  # type: ignore[arg-type]


def launched(storm: Storm) -> Step | None:
    """The step made now, ahead of those under way."""
    before = len(storm.flights)
    storm.launch()
    return storm.flights[-1][0] if len(storm.flights) > before else None


def rows(step: Step | None) -> list[tuple[int, int, int, int | None]]:
    assert step is not None
    return [(row.sequence.id, row.start, row.count, row.token_from) for row in step.rows]


def test_a_token_under_way_is_fed_from_the_row_that_draws_it() -> None:
    storm = a_storm()
    storm.submit(ask(1))
    storm.submit(ask(2, prompt=[5]))
    assert rows(launched(storm)) == [(2, 0, 1, None), (1, 0, 13, None)]
    assert rows(launched(storm)) == [(1, 13, 1, 1), (2, 1, 1, 0)]
    storm.collect()
    assert rows(launched(storm)) == [(1, 14, 1, 0), (2, 2, 1, 1)]
    storm.end()


def test_a_prompt_goes_on_before_its_last_chunk_is_back() -> None:
    storm = a_storm(budget=8)
    storm.submit(ask(1))
    assert rows(launched(storm)) == [(1, 0, 8, None)]
    assert rows(launched(storm)) == [(1, 8, 5, None)]
    storm.collect()
    assert rows(launched(storm)) == [(1, 13, 1, 0)]
    storm.end()


def test_an_end_by_length_is_known_in_advance() -> None:
    storm = a_storm()
    storm.submit(ask(1, max_tokens=2))
    assert launched(storm) is not None
    assert launched(storm) is not None
    storm.collect()
    assert launched(storm) is None
    storm.end()
    assert storm.scheduler.counters.discarded_tokens == 0


def test_the_longest_text_is_known_in_advance_too() -> None:
    storm = a_storm()
    storm.submit(ask(1, max_tokens=1, prompt=[7] * (MAX_MODEL_LEN - 1)))
    storm.end()
    assert storm.scheduler.counters.discarded_tokens == 0


def end_of(submit: Submit, index: int) -> Submit:
    """The same request, told to stop at the token it will say there."""
    token = expected_text(submit, 0, MAX_MODEL_LEN)[index]
    return ask(submit.id, 40, submit.prompt, stop_token_ids=(token,))


def test_a_sequence_that_has_stopped_leaves_one_row_behind() -> None:
    storm = a_storm()
    storm.submit(end_of(ask(1), 1))
    free = storm.pool.num_usable
    assert [bool(launched(storm)), bool(launched(storm))] == [True, True]
    storm.collect()
    assert launched(storm) is not None
    storm.collect()  # it stops, and one step with a row of it is under way
    assert len(storm.answers[0, 1].endings) == 1
    assert storm.pool.num_free < free, "a step under way writes to its pages"
    storm.check()
    storm.collect()
    assert storm.pool.num_free == free
    assert storm.scheduler.counters.discarded_tokens == 1
    assert storm.scheduler.counters.generation_tokens == 2


def test_what_is_cancelled_under_way_keeps_its_pages_until_both_steps_are_back() -> None:
    storm = a_storm()
    storm.submit(ask(1))
    storm.launch()
    storm.launch()
    storm.cancel(0, 1, None)
    for is_held in (True, True, False):
        assert (storm.pool.num_free < storm.pool.num_usable) is is_held
        storm.check()
        storm.collect()
    assert storm.scheduler.counters.discarded_tokens == 2


@pytest.mark.parametrize(
    "reads",
    [
        {"presence_penalty": 0.5},
        {"frequency_penalty": -0.5},
        {"repetition_penalty": 1.1},
        {"bad_words": ((5, 6),)},
    ],
)
def test_what_reads_the_last_token_waits_for_it(reads: dict[str, object]) -> None:
    storm = a_storm()
    storm.submit(ask(1, **reads))
    assert launched(storm) is not None
    assert launched(storm) is None
    storm.collect()
    assert launched(storm) is not None
    storm.end()
    assert storm.num_ahead == 0


def test_choices_wait_for_the_draw_that_parts_them_and_then_run_ahead() -> None:
    storm = a_storm()
    storm.submit(Submit(1, PROMPT, [SamplingSettings(max_tokens=6, choice=i) for i in range(3)]))
    assert launched(storm) is not None
    assert launched(storm) is None
    storm.collect()
    assert launched(storm) is not None
    assert rows(launched(storm)) == [(1, 14, 1, i) for i in range(3)]
    storm.end()


def test_prompt_logprobs_wait_for_their_chunk() -> None:
    storm = a_storm(budget=8)
    storm.submit(Submit(1, PROMPT, [SamplingSettings(max_tokens=6)], prompt_logprobs=0))
    assert launched(storm) is not None
    assert launched(storm) is None
    storm.end()
    assert storm.num_ahead > 0, "once they are known it runs ahead"


def test_nobody_is_preempted_ahead_of_a_step() -> None:
    storm = a_storm(num_blocks=7)
    for number in (1, 2):
        storm.submit(ask(number, 28, prompt=[number] * 7))
    while not storm.scheduler.counters.preemptions:
        preempted_before = storm.scheduler.counters.preemptions
        num_under_way = len(storm.flights)
        storm.turn()
        if storm.scheduler.counters.preemptions > preempted_before:
            assert num_under_way == 0
    storm.end()
    assert storm.num_ahead > 0


def test_a_draw_settled_late_costs_its_sequence_one_row_and_no_other() -> None:
    late = iter([False, False, True])
    storm = a_storm(is_late=lambda: next(late, False))
    storm.submit(ask(1))
    storm.submit(ask(2, prompt=[9, 9]))
    storm.launch()  # both prompts
    storm.launch()  # the first of the two decodes is late, as ``collect`` will find
    storm.collect()
    assert rows(launched(storm)) == [(1, 14, 1, 0), (2, 3, 1, 1)]
    storm.collect()
    assert rows(launched(storm)) == [(1, 14, 1, None), (2, 4, 1, 1)], "again, and now known"
    storm.collect()
    assert rows(launched(storm)) == [(1, 15, 1, 0), (2, 5, 1, 1)]
    storm.end()
    assert storm.scheduler.counters.discarded_tokens == 1
