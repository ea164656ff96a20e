"""Fair shares over many steps: nothing changes for one account, weights are kept, none starves."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from service.engine.adapters import AdapterTable
from service.engine.blocks import BlockPool
from service.engine.fair_share import DECODE_COST
from service.engine.messages import SamplingSettings, Submit
from service.engine.scheduler import PATIENCE, Policy, Scheduler
from service.engine.step import Draw, RowResult, Step, StepResult
from tests.engine.storm import Storm
from tests.engine.test_scheduler_properties import random_submit

PAGE, GRAIN = 8, 4
Range = tuple[int, int]


# ---- one account -------------------------------------------------------------------------------


def told(step: Step) -> tuple[object, ...]:
    rows = [
        (row.sequence.id, row.sequence.choice, row.start, row.count, row.num_ahead, row.token_from)
        for row in step.rows
    ]
    tables = [row.sequence.block_table.copy() for row in step.rows]
    return rows, tables, step.copies, step.stores, step.loads, step.num_tokens


@given(
    seed=st.integers(0, 2**32),
    num_blocks=st.integers(6, 20),
    seqs=st.integers(1, 8),
    budget=st.integers(1, 60),
    ahead=st.booleans(),
    account=st.sampled_from(["", "the only key"]),
)
@settings(max_examples=25, deadline=None)
def test_with_one_account_every_step_is_as_under_first_come_first_served(
    seed: int, num_blocks: int, seqs: int, budget: int, ahead: bool, account: str
) -> None:
    def steps(policy: Policy) -> list[object]:
        dice = random.Random(seed)
        pool = BlockPool(num_blocks, PAGE, GRAIN)
        storm = Storm(pool, seqs, budget, 60, 2000, ahead=ahead, policy=policy)
        seen: list[object] = []
        for number in range(150):
            while dice.random() < 0.15:
                submit = random_submit(dice, number * 1000 + len(storm.answers), [account])
                seen.append(storm.submit(submit))
            if storm.answers and dice.random() < 0.05:
                storm.cancel(*dice.choice(list(storm.answers)), None)
            storm.turn()
            if storm.flight is not None:
                seen.append(told(storm.flight[0]))
        storm.end()
        return seen

    assert steps("fair") == steps("fcfs")


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_a_storm_of_accounts_with_adapters_keeps_books_and_texts(seed: int, ahead: bool) -> None:
    dice = random.Random(seed)
    adapters = AdapterTable(dice.randint(1, 3), 8)
    versions = {name: adapters.add(name) for name in "wxyz"} | {"": 0}
    pool = BlockPool(dice.randint(6, 30), PAGE, GRAIN)
    storm = Storm(
        pool, dice.randint(1, 6), dice.randint(2, 50), 40, 900, ahead=ahead, adapters=adapters
    )
    for number in range(40):
        while dice.random() < 0.5:
            name = dice.choice(list(versions))
            submit = random_submit(dice, 1000 * number + len(storm.answers), "abc")
            storm.submit(replace(submit, adapter=name, adapter_version=versions[name]))
        storm.run(dice.randint(1, 12))
        if dice.random() < 0.1:
            storm.let_time_pass(dice.choice([0.3, 0.6]))
        storm.check()
    storm.end()


# ---- several -----------------------------------------------------------------------------------


@dataclass
class Crowd:
    """Accounts that always have ``backlog`` requests here, and a device that draws at once."""

    weights: dict[str, float]
    kinds: dict[str, tuple[Range, Range]]  # prompts, answers
    slots: int = 16
    pages: int = 400
    budget: int = 128
    policy: Policy = "fair"
    backlog: int = 24
    seed: int = 0
    spent: Counter[str] = field(default_factory=Counter)  # device work
    num_computed: int = 0
    num_served: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.dice = random.Random(self.seed)
        self.pool = BlockPool(self.pages, 256)
        self.scheduler = Scheduler(
            self.pool,
            max_num_seqs=self.slots,
            max_num_batched_tokens=self.budget,
            max_model_len=4096,
            policy=self.policy,
            clock=lambda: 0.0,
        )
        self.owners: dict[int, str] = {}
        self.here: Counter[str] = Counter()

    def run(self, num_steps: int) -> None:
        for _ in range(num_steps):
            for account in self.weights:
                while self.here[account] < self.backlog:
                    self.submit(account)
            self.step()

    def submit(self, account: str) -> int:
        number = len(self.owners)
        prompts, answers = self.kinds[account]
        choice = SamplingSettings(max_tokens=self.dice.randint(*answers))
        prompt = [number % 30_000 + 3] * self.dice.randint(*prompts)
        weight = self.weights[account]
        self.scheduler.add(Submit(number, prompt, [choice], account=account, weight=weight))
        self.owners[number] = account
        self.here[account] += 1
        return number

    def step(self) -> None:
        step = self.scheduler.schedule()
        assert step is not None
        for row in step.rows:
            cost = DECODE_COST if row.count == 1 else row.count
            self.spent[row.sequence.account.name] += cost  # type: ignore[assignment]
            self.num_computed += row.count
        result = StepResult([RowResult([Draw(7)] * len(row.choices)) for row in step.rows])
        for output in self.scheduler.update(step, result).get(0, []):
            if output.finish_reason is not None:
                self.here[self.owners[output.id]] -= 1
                self.num_served[self.owners[output.id]] += 1

    def share(self, account: str) -> float:
        return self.spent[account] / sum(self.spent.values())


SHORT, MIDDLE, LONG = (
    ((5, 20), (5, 10)),
    ((1, 200), (1, 100)),
    ((1500, 2000), (300, 400)),
)


@pytest.mark.parametrize(
    ("weights", "kinds"),
    [
        ({"a": 1.0, "b": 1.0}, {"a": MIDDLE, "b": MIDDLE}),
        ({"a": 1.0, "b": 2.0, "c": 4.0}, {"a": MIDDLE, "b": MIDDLE, "c": MIDDLE}),
        ({"a": 1.0, "b": 1.0}, {"a": LONG, "b": SHORT}),
        ({"a": 3.0, "b": 1.0}, {"a": SHORT, "b": LONG}),
        ({"a": 0.5, "b": 1.5, "c": 1.0}, {"a": LONG, "b": SHORT, "c": MIDDLE}),
    ],
)
def test_whoever_always_has_work_gets_the_device_by_weight(
    weights: dict[str, float], kinds: dict[str, tuple[Range, Range]]
) -> None:
    crowd = Crowd(weights, kinds)
    crowd.run(2500)
    for account, weight in weights.items():
        fair = weight / sum(weights.values())
        assert crowd.share(account) == pytest.approx(fair, rel=0.05), account


def test_under_first_come_first_served_long_requests_take_it_all() -> None:
    crowd = Crowd({"a": 1.0, "b": 1.0}, {"a": LONG, "b": SHORT}, policy="fcfs")
    crowd.run(2500)
    assert crowd.share("b") < 0.05


def test_shares_hold_where_pages_are_what_is_short() -> None:
    weights = {"a": 1.0, "b": 1.0, "c": 3.0}
    crowd = Crowd(weights, dict.fromkeys(weights, MIDDLE), pages=12)
    crowd.run(4000)
    for account, weight in weights.items():
        assert crowd.share(account) == pytest.approx(weight / 5, rel=0.06), account


def test_shares_cost_next_to_no_work_done_twice() -> None:
    kinds = {"a": LONG, "b": SHORT, "c": MIDDLE}
    fair, first_come = (
        Crowd(dict.fromkeys(kinds, 1.0), kinds, pages=60, policy=policy)
        for policy in ("fair", "fcfs")
    )
    for crowd in (fair, first_come):
        crowd.run(2500)
    counters = fair.scheduler.counters
    useful = counters.prompt_tokens + counters.generation_tokens
    assert fair.num_computed < 1.1 * useful
    assert counters.yields < 0.05 * sum(fair.num_served.values())
    lost = sum(fair.spent.values()) / sum(first_come.spent.values())
    assert lost > 0.95, "steps are as full as without"


@given(
    weights=st.lists(st.sampled_from([0.05, 1.0, 1.0, 4.0]), min_size=2, max_size=6),
    kinds=st.lists(st.sampled_from([SHORT, MIDDLE, LONG]), min_size=6, max_size=6),
    slots=st.integers(1, 6),
    pages=st.integers(18, 40),
    backlog=st.integers(1, 10),
    seed=st.integers(0, 1000),
)
@settings(max_examples=25, deadline=None)
def test_every_account_with_work_gets_on_within_a_bound(
    weights: list[float],
    kinds: list[tuple[Range, Range]],
    slots: int,
    pages: int,
    backlog: int,
    seed: int,
) -> None:
    """Sequences that run get on in every few steps; so what has to be shown is that each comes to
    run. The bound: what it is owed until all make room, twice the longest request for those that
    run to get on or end, and as much for those owed more."""
    names = "abcdef"[: len(weights)]
    crowd = Crowd(
        dict(zip(names, weights, strict=True)),
        dict(zip(names, kinds, strict=False)),
        slots,
        pages,
        budget=64,
        backlog=backlog,
        seed=seed,
    )
    longest = 2000 + 400 * DECODE_COST
    share = min(weights) / sum(weights)
    bound = (PATIENCE * 64 + 2 * slots * longest) / share
    since = dict.fromkeys(names, 0.0)
    before: Counter[str] = Counter()
    for _ in range(700):
        crowd.run(1)
        done = sum(crowd.spent.values())
        for name in names:
            if crowd.spent[name] > before[name]:
                since[name] = done
            assert done - since[name] < bound, f"{name} stands still"
        before = crowd.spent.copy()


def test_more_accounts_than_slots_all_get_their_turn_beside_endless_answers() -> None:
    """Time slices: whoever holds the one slot gives it up for who is owed too much."""
    names = "abcdefgh"
    crowd = Crowd(
        dict.fromkeys(names, 1.0),
        dict.fromkeys(names, ((10, 10), (4000, 4000))),
        slots=2,
        budget=16,
        backlog=1,
    )
    crowd.run(6000)
    for name in names:
        assert crowd.share(name) == pytest.approx(1 / 8, rel=0.25)
