"""What the queue says it has room for is what it takes: the HTTP process refuses by it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from service.engine.blocks import BlockPool
from service.engine.messages import SamplingSettings, Submit
from service.engine.scheduler import Scheduler
from service.errors import Overloaded

NUM_SLOTS = 2


def a_scheduler(max_queued_requests: int, max_queued_tokens: int) -> Scheduler:
    return Scheduler(
        BlockPool(40, 8, 4),
        max_num_seqs=NUM_SLOTS,
        max_num_batched_tokens=16,
        max_model_len=64,
        max_queued_requests=max_queued_requests,
        max_queued_tokens=max_queued_tokens,
    )


def ask(number: int, num_tokens: int, n: int = 1, account: str = "") -> Submit:
    settings = [SamplingSettings(max_tokens=4, choice=choice) for choice in range(n)]
    return Submit(number, [1] * num_tokens, settings, account=account)


def refusal(scheduler: Scheduler, submit: Submit) -> Overloaded | None:
    try:
        scheduler.add(submit)
    except Overloaded as error:
        return error
    return None


sizes = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 3)), max_size=12)


@given(sizes, st.integers(1, 6), st.integers(8, 60))
def test_room_is_what_the_queue_takes(
    sizes: list[tuple[int, int]], max_requests: int, max_tokens: int
) -> None:
    """After any requests: a lone token enters while there is room, and never once there is none."""
    scheduler = a_scheduler(max_requests, max_tokens)
    for number, (num_tokens, n) in enumerate(sizes):
        refusal(scheduler, ask(number, num_tokens, n))
    number = len(sizes)
    while (room := scheduler.room().anybody) > 0:
        refused = refusal(scheduler, ask(number, 1))
        assert refused is None, f"{room} were promised"
        assert scheduler.room().anybody < room
        number += 1
    seconds = scheduler.room().retry_after
    refused = refusal(scheduler, ask(number, 1))
    assert refused is not None
    assert refused.retry_after is not None
    assert 1 <= seconds <= refused.retry_after <= 60


def test_free_slots_are_room() -> None:
    scheduler = a_scheduler(1, 1000)
    assert scheduler.room().anybody == 1 + NUM_SLOTS


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 9)), max_size=40))
def test_a_full_queue_names_those_who_get_no_more_of_it(asks: list[tuple[str, int]]) -> None:
    """Whoever crowds it is refused as it says, whoever does not is taken in."""
    scheduler = a_scheduler(6, 1000)
    for number, (account, num_tokens) in enumerate(asks):
        refusal(scheduler, ask(number, num_tokens, account=account))
    number = len(asks)
    while (room := scheduler.room()).anybody:
        assert refusal(scheduler, ask(number, 1, account="a")) is None
        number += 1
    for account in "abcd":
        promised = account not in room.crowding and room.spare > 0
        refused = refusal(scheduler, ask(number, 1, account=account))
        assert (refused is None) == promised, (account, room)
        number += 1
        room = scheduler.room()
