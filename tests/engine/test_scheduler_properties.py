"""Random storms of submits, cancels, deadlines and failures over pools of a few pages.

The runner remembers what every page and every host slot holds (recording_runner.py), so each step
proves that every position reads its own prefix: copy-on-write, eviction, preemption, sharing and
the way to host memory and back cannot go wrong unseen.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from msgspec.structs import replace

from service.engine.blocks import BlockPool
from service.engine.host_slots import HostSlots
from service.engine.messages import SamplingSettings, Submit
from service.engine.scheduler import NO_SPECULATION, Policy
from service.engine.speculation import SpeculationLimits
from tests.engine.recording_runner import END, VOCABULARY
from tests.engine.storm import Storm

PAGE, GRAIN = 8, 4
SPECULATION = SpeculationLimits(most=8, most_in_step=24, has_draft=True)

# Few stems, so that requests share prefixes of every length, in the middle of grains and pages.
STEMS = [[5] * 60, list(range(4, 40)) * 2, [7, 8] * 30]
prompts = st.builds(
    lambda stem, kept, tail: (stem[:kept] + tail) or [1],
    st.sampled_from(STEMS),
    st.integers(0, 45),
    st.lists(st.integers(0, VOCABULARY - 1), max_size=3),
)
samplings = st.builds(
    SamplingSettings,
    max_tokens=st.integers(0, 20),
    min_tokens=st.integers(0, 4),
    seed=st.integers(0, 2),
    eos_token_ids=st.sampled_from([(), (END,)]),
    stop_token_ids=st.sampled_from([(), (4, 5)]),
    logprobs=st.sampled_from([None, 0]),
    presence_penalty=st.sampled_from([0.0, 0.0, 0.0, 0.5]),  # such rows wait for the step before
    speculative_method=st.sampled_from(["none", "ngram", "draft"]),
    num_speculative_tokens=st.integers(0, 12),
)
speculations = st.builds(
    SpeculationLimits,
    most=st.sampled_from([0, 1, 8]),
    most_in_step=st.sampled_from([1, 16]),
    has_draft=st.booleans(),
    shortest=st.integers(1, 2),
    longest=st.integers(2, 4),
)


class StormMachine(RuleBasedStateMachine):
    """Found failures shrink to the few moves that matter."""

    @initialize(
        num_blocks=st.integers(3, 24),
        max_num_seqs=st.integers(1, 6),
        budget=st.integers(1, 40),
        caching=st.booleans(),
        speculation=speculations,
        slots=st.integers(0, 12),
        ahead=st.booleans(),
        policy=st.sampled_from(["fair", "fair", "fcfs"]),
        dice=st.randoms(use_true_random=False),
    )
    def start(
        self,
        num_blocks: int,
        max_num_seqs: int,
        budget: int,
        caching: bool,
        speculation: SpeculationLimits,
        slots: int,
        ahead: bool,
        policy: Policy,
        dice: random.Random,
    ) -> None:
        host = HostSlots(slots)
        pool = BlockPool(num_blocks, PAGE, GRAIN, enable_prefix_caching=caching, host=host)
        self.storm = Storm(
            pool,
            max_num_seqs,
            budget,
            speculation=speculation,
            ahead=ahead,
            is_late=lambda: dice.random() < 0.1,
            policy=policy,
        )
        self.numbers = 0

    @rule(
        client=st.integers(0, 1),
        prompt=prompts,
        settings=st.lists(samplings, min_size=1, max_size=4),
        priority=st.integers(-1, 1),
        namespace=st.sampled_from([b"", b"mine"]),
        prompt_logprobs=st.sampled_from([None, None, 0]),
        deadline=st.sampled_from([None, None, None, 3.0, 30.0]),
        max_queue=st.sampled_from([None, None, None, 2.0]),
        account=st.sampled_from(["", "", "a", "b"]),
        weight=st.sampled_from([1.0, 1.0, 0.1, 5.0]),
    )
    def submit(self, client: int, **fields: object) -> None:
        self.numbers += 1
        self.storm.submit(Submit(self.numbers, **fields), client)  # type: ignore[arg-type]

    @precondition(lambda self: self.storm.answers)
    @rule(data=st.data(), choice=st.sampled_from([None, 0, 1, 2, 3]))
    def cancel(self, data: st.DataObject, choice: int | None) -> None:
        client, number = data.draw(st.sampled_from(sorted(self.storm.answers)))
        self.storm.cancel(client, number, choice)

    @rule(client=st.integers(0, 1))
    def lose_connection(self, client: int) -> None:
        self.storm.lose_connection(client)

    @rule()
    def launch(self) -> None:
        self.storm.launch()

    @rule()
    def launch_in_vain(self) -> None:
        self.storm.launch_in_vain()

    @rule(lacks_memory=st.booleans(), has_run=st.booleans())
    def abandon(self, lacks_memory: bool, has_run: bool) -> None:
        self.storm.abandon(lacks_memory=lacks_memory, has_run=has_run)

    @rule(failing=st.sampled_from([None, None, None, 0, 1, 5]))
    def collect(self, failing: int | None) -> None:
        self.storm.collect(failing)

    @rule(times=st.integers(1, 30))
    def run_steps(self, times: int) -> None:
        self.storm.run(times)

    @rule(seconds=st.sampled_from([0.5, 2.0, 10.0]))
    def let_time_pass(self, seconds: float) -> None:
        self.storm.let_time_pass(seconds)

    @invariant()
    def books_are_right(self) -> None:
        if hasattr(self, "storm"):
            self.storm.check()

    def teardown(self) -> None:
        if hasattr(self, "storm"):
            self.storm.end()


StormMachine.TestCase.settings = settings(
    max_examples=100,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
test_any_order_of_events_keeps_the_books_and_the_texts = StormMachine.TestCase


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("seed", range(40))
def test_a_long_storm_over_a_tiny_pool_leaves_every_block_free(seed: int, ahead: bool) -> None:
    dice = random.Random(seed)
    host = HostSlots(dice.choice([0, 1, 3, 8, 40]))
    pool = BlockPool(
        dice.randint(6, 20), PAGE, GRAIN, enable_prefix_caching=seed % 8 > 0, host=host
    )
    late = random.Random(seed)
    accounts = "abcdef"[: 1 + seed % 6]
    storm = Storm(
        pool,
        dice.randint(1, 8),
        dice.randint(1, 60),
        60,
        2000,
        SPECULATION if seed % 2 else NO_SPECULATION,
        ahead=ahead,
        is_late=lambda: late.random() < 0.1,
    )
    for number in range(60):
        while dice.random() < 0.5:
            storm.submit(
                random_submit(dice, len(storm.answers) + 1000 * number, accounts),
                dice.randint(0, 1),
            )
        storm.run(dice.randint(1, 12))
        if storm.answers and dice.random() < 0.3:
            client, cancelled = dice.choice(list(storm.answers))
            storm.cancel(client, cancelled, dice.choice([None, 0, 1]))
        if dice.random() < 0.1:
            storm.collect(dice.randint(0, 5))
        if dice.random() < 0.05:
            storm.launch_in_vain()
        if dice.random() < 0.1:
            storm.abandon(lacks_memory=dice.random() < 0.5, has_run=dice.random() < 0.5)
        if dice.random() < 0.1:
            storm.let_time_pass(dice.choice([0.5, 3.0]))
        storm.check()
    storm.end()
    assert bool(storm.num_ahead) is ahead


def random_submit(dice: random.Random, number: int, accounts: Sequence[str]) -> Submit:
    kept = dice.randint(0, 50)
    tail = [dice.randrange(VOCABULARY) for _ in range(dice.randint(0, 4))]
    choice = SamplingSettings(
        max_tokens=dice.randint(1, 25),
        min_tokens=dice.choice([0, 0, 3]),
        seed=dice.randint(0, 1),
        eos_token_ids=dice.choice([(), (END,)]),
        presence_penalty=dice.choice([0.0] * 9 + [0.5]),
        speculative_method=dice.choice(["none", "ngram", "draft"]),
        num_speculative_tokens=dice.randint(1, 10),
    )
    return Submit(
        number,
        (dice.choice(STEMS)[:kept] + tail) or [1],
        [replace(choice, choice=i) for i in range(dice.choice([1, 1, 1, 2, 5]))],
        namespace=dice.choice([b"", b"", b"mine"]),
        priority=dice.choice([0, 0, 0, -1, 2]),
        prompt_logprobs=dice.choice([None] * 4 + [0]),
        deadline=dice.choice([None] * 6 + [2.0]),
        account=dice.choice(accounts),
        weight=dice.choice([1.0, 1.0, 3.0]),
    )
