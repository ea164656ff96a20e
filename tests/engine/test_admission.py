"""What the queue says it has room for is what it takes: the HTTP process refuses by it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from service.engine.admission import MOST_NAMED
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


requests = st.lists(
    st.tuples(st.integers(1, 30), st.integers(1, 3), st.sampled_from(["a", "b", "c"])), max_size=16
)


@given(requests, st.integers(1, 6), st.integers(8, 60))
def test_room_is_what_the_queue_takes(
    requests: list[tuple[int, int, str]], max_requests: int, max_tokens: int
) -> None:
    """After any requests: a lone token enters while there is room. Once there is none, those named
    are refused for the time that stands there, and so is everybody where it is shut."""
    scheduler = a_scheduler(max_requests, max_tokens)
    for number, (num_tokens, n, account) in enumerate(requests):
        refusal(scheduler, ask(number, num_tokens, n, account))
    number = len(requests)
    while (room := scheduler.room()).num_sequences > 0:
        assert refusal(scheduler, ask(number, 1, account="a")) is None, "room was promised"
        assert scheduler.room().num_sequences < room.num_sequences
        number += 1
    for account in ("a", "b", "c", "stranger"):
        room = scheduler.room()
        refused = refusal(scheduler, ask(number, 1, account=account))
        number += 1
        assert (refused is not None) == (room.is_shut or account in room.refused)
        if refused is not None and account in room.refused:
            assert refused.retry_after == room.refused[account]
        assert 1 <= room.retry_after <= 60


def test_a_full_queue_still_takes_what_is_owed() -> None:
    """All that ran and waited in an engine that died comes to the next one's queue at once."""
    scheduler = a_scheduler(1, 8)
    taken = [refusal(scheduler, ask(number, 8)) is None for number in range(8)]
    assert not taken[-1]
    assert refusal(scheduler, replace(ask(8, 8), is_owed=True)) is None


def test_free_slots_are_room() -> None:
    scheduler = a_scheduler(1, 1000)
    assert scheduler.room().num_sequences == 1 + NUM_SLOTS


def test_of_a_crowd_nobody_is_named() -> None:
    """Naming them would cost every step more than asking the engine costs those who come."""
    scheduler = a_scheduler(2, 1000)
    for number in range(MOST_NAMED + 1):
        refusal(scheduler, ask(number, 1, account=f"key {number}"))
    assert scheduler.room().num_sequences == 0
    assert len(scheduler.room().refused) <= MOST_NAMED
