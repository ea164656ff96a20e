"""Several accounts in one engine, promise by promise. Pages are of 8 tokens, grains of 4."""

from __future__ import annotations

from collections import Counter

import pytest

from service.engine.account import Account
from service.engine.adapters import PATIENCE, AdapterTable
from service.engine.blocks import BlockPool
from service.engine.messages import SamplingSettings, Submit
from service.engine.sequence import Request, Sequence
from service.engine.step import Step
from service.engine.yielding import by_share_of_pages
from service.errors import Overloaded
from tests.engine.storm import Storm

PAGE, GRAIN = 8, 4


def a_storm(
    num_blocks: int = 200,
    seqs: int = 4,
    budget: int = 32,
    pool: BlockPool | None = None,
    **fields: object,
) -> Storm:
    bounds = {"max_queued_requests": 1000, "max_queued_tokens": 100_000}
    pool = pool or BlockPool(num_blocks, PAGE, GRAIN)
    return Storm(pool, seqs, budget, **(bounds | fields))  # type: ignore[arg-type]


def ask(
    account: str, number: int, prompt: int = 4, max_tokens: int = 4, n: int = 1, **fields: object
) -> Submit:
    settings = [SamplingSettings(max_tokens=max_tokens, choice=i) for i in range(n)]
    tokens = [ord(account[0]) % 50, *[number % 50] * (prompt - 1)]
    return Submit(number, tokens, settings, account=account, **fields)  # type: ignore[arg-type]


def next_step(storm: Storm) -> Step:
    storm.collect()
    storm.launch()
    storm.check()
    assert storm.flight is not None
    return storm.flight[0]


def tokens_by_account(step: Step) -> dict[str, int]:
    found: dict[str, int] = {}
    for row in step.rows:
        found[row.sequence.account.name] = found.get(row.sequence.account.name, 0) + row.count
    return found


def running(storm: Storm, account: str) -> list[Sequence]:
    line = storm.scheduler._lineup.running
    return [sequence for sequence in line if sequence.account.name == account]


def flood(storm: Storm, account: str, count: int, first: int = 1000, **fields: object) -> None:
    for number in range(first, first + count):
        storm.submit(ask(account, number, **fields))  # type: ignore[arg-type]


def first_token_at(storm: Storm, number: int, most: int = 200) -> int:
    """Steps until that request says its first token."""
    for count in range(1, most):
        storm.run(1)
        storm.check()
        if storm.answers[0, number].outputs:
            return count
    raise AssertionError("it says nothing")


# ---- slots -------------------------------------------------------------------------------------


def test_a_flood_of_one_account_leaves_another_its_place_at_once() -> None:
    storm = a_storm()
    flood(storm, "greedy", 100, max_tokens=60)
    storm.run(10)
    storm.submit(ask("victim", 1))
    assert first_token_at(storm, 1) <= 2
    assert storm.scheduler.counters.yields == 1
    storm.end()


def test_first_come_first_served_has_it_wait_for_the_flood() -> None:
    storm = a_storm(policy="fcfs")
    flood(storm, "greedy", 20, max_tokens=60)
    storm.run(10)
    storm.submit(ask("victim", 1))
    assert first_token_at(storm, 1, 1000) > 200
    storm.end()


def test_the_youngest_gives_way_and_goes_on_where_it_was() -> None:
    storm = a_storm()
    flood(storm, "greedy", 4, max_tokens=60)
    storm.run(10)
    storm.submit(ask("victim", 1))
    storm.run(1)
    storm.launch()
    assert [sequence.id for sequence in running(storm, "greedy")] == [1000, 1001, 1002]
    assert [sequence.id for sequence in running(storm, "victim")] == [1]
    storm.run(10)
    (youngest,) = (one for one in running(storm, "greedy") if one.id == 1003)
    assert youngest.num_reached > 0
    assert youngest.num_redone < GRAIN, "the rest was found in the prefix cache"
    storm.end()


def test_nobody_below_its_share_gives_way() -> None:
    storm = a_storm()
    flood(storm, "a", 2, first=1, max_tokens=60)
    flood(storm, "b", 2, first=11, max_tokens=60)
    storm.run(5)
    flood(storm, "a", 10, first=21, max_tokens=60)
    flood(storm, "b", 10, first=41, max_tokens=60)
    storm.run(20)
    assert storm.scheduler.counters.yields == 0
    storm.end()


def test_a_weight_is_a_share_of_slots() -> None:
    storm = a_storm(seqs=12, num_blocks=400)
    flood(storm, "light", 60, max_tokens=70, weight=1.0)
    storm.run(5)
    flood(storm, "heavy", 60, first=2000, max_tokens=70, weight=3.0)
    storm.run(3)
    assert len(running(storm, "light")) == 5, "less than twice the share is left to ends"
    assert len(running(storm, "heavy")) == 7
    storm.end()


def test_who_was_thrown_back_gets_on_before_it_gives_way_again() -> None:
    storm = a_storm(seqs=2, pool=BlockPool(40, PAGE, GRAIN, enable_prefix_caching=False))
    flood(storm, "greedy", 2, max_tokens=70)
    computed = Counter[Sequence]()
    for number in range(1, 300):
        storm.submit(ask("victim", number, max_tokens=1))
        for row in next_step(storm).rows:
            computed[row.sequence] += row.count
    storm.end()
    assert storm.scheduler.counters.yields >= 2
    greedy = {one: count for one, count in computed.items() if one.account.name == "greedy"}
    assert all(count <= 2 * len(one.tokens) for one, count in greedy.items())
    assert any(count > len(one.tokens) for one, count in greedy.items())


# ---- pages -------------------------------------------------------------------------------------


def test_pages_are_given_up_too() -> None:
    storm = a_storm(num_blocks=21, seqs=8)  # 20 to be given out: the flood's 4 take all
    flood(storm, "greedy", 4, prompt=39, max_tokens=30)
    storm.run(6)
    assert storm.pool.num_free < 3
    storm.submit(ask("victim", 1, prompt=20))
    assert first_token_at(storm, 1) <= 2
    assert storm.scheduler.counters.yields > 0
    storm.end()


def test_who_grows_into_a_full_pool_pushes_out_who_holds_most() -> None:
    storm = a_storm(num_blocks=21, seqs=8, budget=64)
    storm.submit(ask("small", 1, prompt=7, max_tokens=60))
    flood(storm, "greedy", 4, prompt=30, max_tokens=45)
    small = next(iter(storm.scheduler._requests.values())).sequences[0]
    preempted = False
    for _ in range(100):
        storm.run(1)
        storm.check()
        preempted |= small.num_reached > 0
    assert storm.scheduler.counters.preemptions > 0
    assert not preempted
    storm.end()


def test_a_prompt_that_needs_most_of_the_pool_gets_it_in_the_end() -> None:
    storm = a_storm(num_blocks=13, seqs=6)
    for number in range(1, 6):
        storm.submit(ask("small", number, prompt=8, max_tokens=20))
    storm.run(3)
    storm.submit(ask("large", 1000, prompt=70, max_tokens=9))
    number = 10
    for _ in range(400):
        while len(storm.scheduler._waiting) < 8:
            number += 1
            storm.submit(ask("small", number, prompt=8, max_tokens=20))
        storm.run(1)
        storm.check()
        if storm.answers[0, 1000].outputs:
            break
    assert storm.answers[0, 1000].outputs, "small ones passed it for ever"
    storm.end()


# ---- prompts -----------------------------------------------------------------------------------


def test_a_short_prompt_is_computed_beside_a_long_one() -> None:
    storm = a_storm(num_blocks=100, seqs=8, budget=64)
    flood(storm, "greedy", 20, prompt=70, max_tokens=2)
    storm.run(2)
    storm.submit(ask("victim", 30, prompt=10))
    step = next_step(storm)
    assert tokens_by_account(step)["victim"] == 10
    assert tokens_by_account(step)["greedy"] >= 50, "the rest of the budget is not left over"
    storm.end()


def test_two_long_prompts_share_the_budget_by_weight() -> None:
    storm = a_storm(num_blocks=400, seqs=40, budget=512)
    flood(storm, "light", 30, prompt=70, max_tokens=1, weight=1.0)
    flood(storm, "heavy", 30, first=2000, prompt=70, max_tokens=1, weight=3.0)
    shared = tokens_by_account(next_step(storm))
    assert sum(shared.values()) == 512
    assert 0.2 <= shared["light"] / 512 <= 0.3
    storm.end()


def test_cached_tokens_are_free() -> None:
    storm = a_storm(num_blocks=100, budget=128, seqs=8)
    storm.submit(ask("a", 5, prompt=64, max_tokens=1))
    storm.run(3)
    storm.submit(ask("b", 1, prompt=10, max_tokens=30))
    storm.run(2)
    storm.submit(ask("a", 55, prompt=64, max_tokens=1))
    account = storm.scheduler._shares.active["a"]
    before = account.level
    next_step(storm)
    assert account.level - before == 1, "63 of 64 were there"
    storm.end()


def test_long_prompts_of_two_accounts_are_computed_in_one_step() -> None:
    storm = a_storm(num_blocks=400, seqs=8, budget=64)
    flood(storm, "a", 2, prompt=70, max_tokens=1)
    flood(storm, "b", 2, first=2000, prompt=70, max_tokens=1)
    assert tokens_by_account(next_step(storm)) == {"a": 32, "b": 32}
    storm.end()


def test_a_sequence_thrown_back_may_yield_once_it_has_made_up_for_it() -> None:
    sequence = Sequence.start(Request(ask("a", 1, prompt=8), 0, 0, 0.0))
    assert sequence.may_yield
    sequence.num_reached, sequence.num_redone = 200, 100
    sequence.num_computed = 299
    assert not sequence.may_yield
    sequence.num_computed = 300
    assert sequence.may_yield


def test_the_last_in_line_is_the_youngest_of_who_holds_most_pages_for_its_weight() -> None:
    def holding(account: Account, number: int, pages: int) -> Sequence:
        request = Request(ask(account.name, number), 0, number, 0.0, account=account)
        sequence = Sequence.start(request)
        sequence.block_table = list(range(pages))
        return sequence

    light, heavy = Account("light", 1.0), Account("heavy", 4.0)
    line = [holding(light, 1, 2), holding(light, 2, 2), holding(heavy, 3, 7), holding(heavy, 4, 7)]
    assert [sequence.id for sequence in by_share_of_pages(line)] == [3, 1, 4, 2]


# ---- the client's own word ---------------------------------------------------------------------


def test_priority_counts_within_an_account_only() -> None:
    storm = a_storm(seqs=1, budget=8)
    storm.submit(ask("a", 1, max_tokens=20))
    storm.run(3)
    flood(storm, "b", 3, first=10, max_tokens=1)
    storm.submit(ask("b", 20, max_tokens=1, priority=-5))
    flood(storm, "a", 3, first=30, max_tokens=1, priority=-1000)
    said = []
    for _ in range(60):
        storm.run(1)
        for (_, number), answer in storm.answers.items():
            if answer.outputs and number not in said:
                said.append(number)
    assert [number for number in said if number in (10, 11, 12, 20)] == [20, 10, 11, 12]
    assert said.index(20) < said.index(30), "b was owed more than a, whatever a claims"
    storm.end()


# ---- the queue's bound -------------------------------------------------------------------------


def test_a_queue_filled_by_one_account_still_takes_the_share_of_another() -> None:
    storm = a_storm(max_queued_requests=10)
    flood(storm, "greedy", 14, max_tokens=40)
    storm.run(1)
    assert len(storm.scheduler._waiting) == 10
    with pytest.raises(Overloaded, match="10 sequences with 40 prompt tokens wait"):
        storm.scheduler.add(ask("greedy", 1))
    taken = [storm.submit(ask("victim", number, max_tokens=40)) for number in range(1, 10)]
    assert taken.count(True) == 5, "its half of the bound"
    with pytest.raises(Overloaded, match=r"5 with 20 are this key's, .* beside 1 other key is 50"):
        storm.scheduler.add(ask("victim", 100))
    with pytest.raises(Overloaded, match=r"10 with 40 are this key's"):
        storm.scheduler.add(ask("greedy", 101))
    storm.end()


def test_a_queue_filled_with_tokens_takes_one_request_of_who_has_none_there() -> None:
    storm = a_storm(max_queued_tokens=100)
    flood(storm, "greedy", 4, prompt=4, max_tokens=60)
    storm.run(2)
    flood(storm, "greedy", 2, first=2000, prompt=50, max_tokens=4)
    assert not storm.submit(ask("greedy", 1, prompt=1))
    assert storm.submit(ask("victim", 2, prompt=70)), "more than half, but its only one"
    assert not storm.submit(ask("victim", 3, prompt=4))
    assert not storm.submit(ask("third", 4, prompt=70)), "twice the bound is the end"
    storm.end()


def test_many_accounts_take_the_queue_no_further_than_twice_its_bound() -> None:
    storm = a_storm(max_queued_requests=10)
    flood(storm, "greedy", 14, max_tokens=40)
    storm.run(1)
    for number in range(100):
        storm.submit(ask(f"key {number}", number, max_tokens=40))
        assert len(storm.scheduler._waiting) <= 20
    storm.end()


def test_retry_after_counts_the_share_and_not_the_whole_engine() -> None:
    storm = a_storm(max_queued_requests=400, max_queued_tokens=10**6)
    storm.scheduler.rate.seconds_for = lambda sequences, tokens: sequences  # type: ignore[method-assign]
    flood(storm, "greedy", 404, max_tokens=40)
    storm.run(1)
    with pytest.raises(Overloaded) as alone:
        storm.scheduler.add(ask("greedy", 1))
    storm.submit(ask("third", 2))
    with pytest.raises(Overloaded) as beside:
        storm.scheduler.add(ask("greedy", 1))
    assert alone.value.retry_after == 401 - 200
    assert beside.value.retry_after == 2 * 401 - 200, "half of the device is its own"
    storm.scheduler.cancel_client(0)


# ---- everything else goes on -------------------------------------------------------------------


def test_forks_of_a_flood_wait_for_their_share_as_well() -> None:
    storm = a_storm(seqs=6)
    flood(storm, "greedy", 10, max_tokens=60, n=5)
    storm.run(10)
    storm.submit(ask("victim", 1, n=2))
    assert first_token_at(storm, 1) <= 2
    storm.end()


def test_running_ahead_waits_for_who_has_to_give_way() -> None:
    storm = a_storm(ahead=True)
    flood(storm, "greedy", 50, max_tokens=60)
    storm.run(10)
    assert storm.num_ahead > 0
    storm.submit(ask("victim", 1))
    assert first_token_at(storm, 1) <= 4
    assert storm.scheduler.counters.yields == 1
    before = storm.num_ahead
    storm.run(10)
    assert storm.num_ahead > before
    storm.end()


def test_accounts_that_take_turns_at_waiting_for_an_adapter_both_get_it() -> None:
    adapters = AdapterTable(1, 8)
    versions = {name: adapters.add(name) for name in ("x", "y", "z")}
    storm = a_storm(adapters=adapters, seqs=4)

    def adapted(account: str, number: int, name: str, max_tokens: int = 20) -> Submit:
        fields = {"adapter": name, "adapter_version": versions[name]}
        return ask(account, number, max_tokens=max_tokens, **fields)

    storm.submit(adapted("a", 1, "x"))
    storm.run(3)
    storm.submit(adapted("b", 2, "y", 2))
    storm.submit(adapted("c", 3, "z", 2))
    number = 10
    for _ in range(300):
        while len(running(storm, "a")) + len(list(storm.scheduler._waiting)) < 5:
            number += 1
            storm.submit(adapted("a", number, "x"))
        storm.run(1)
        storm.check()
        if storm.answers[0, 2].endings and storm.answers[0, 3].endings:
            break
    assert storm.answers[0, 2].endings
    assert storm.answers[0, 3].endings
    assert storm.now < 20 * PATIENCE
    storm.end()


def test_an_estimate_counts_those_that_would_go_before() -> None:
    storm = a_storm(seqs=1, budget=16)
    flood(storm, "greedy", 20, prompt=16, max_tokens=1)
    storm.run(2)

    def queue_seconds(account: str) -> float:
        submit = ask(account, 1, prompt=16, max_tokens=1)
        return storm.scheduler.estimate([submit], lambda tokens: 1.0)["queue_seconds"]

    assert queue_seconds("victim") < 3
    assert queue_seconds("greedy") > 10
    storm.end()
