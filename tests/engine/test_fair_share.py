"""Levels of accounts: virtual time, lifted where somebody was away."""

from __future__ import annotations

from service.engine.account import Account, rank
from service.engine.fair_share import FairShare


def first_of(*accounts: Account) -> str:
    return min(accounts, key=rank).name


def test_who_was_charged_least_for_its_weight_goes_first() -> None:
    shares = FairShare(100)
    small, large = shares.join("small", 1.0), shares.join("large", 4.0)
    shares.charge(small, 10)
    shares.charge(large, 39)
    assert first_of(small, large) == "large"
    shares.charge(large, 2)
    assert first_of(small, large) == "small"


def test_of_two_at_one_level_the_newer_goes_first() -> None:
    shares = FairShare(100)
    old, new = shares.join("old", 1.0), shares.join("new", 1.0)
    assert first_of(old, new) == "new"


def test_being_idle_saves_nothing_up() -> None:
    shares = FairShare(100)
    busy, other = shares.join("busy", 1.0), shares.join("other", 1.0)
    idle = shares.join("idle", 1.0)
    shares.leave(idle)
    shares.charge(busy, 1000)
    shares.charge(other, 900)
    assert shares.join("idle", 1.0).level == 900


def test_who_comes_back_at_once_keeps_what_it_owes() -> None:
    shares = FairShare(100)
    shares.join("other", 1.0)
    greedy = shares.join("greedy", 1.0)
    shares.charge(greedy, 500)
    shares.leave(greedy)
    assert shares.preview("greedy", 1.0).level == 500
    assert shares.join("greedy", 1.0).level == 500


def test_with_nobody_here_nobody_is_owed_anything() -> None:
    shares = FairShare(100)
    account = shares.join("a", 1.0)
    shares.charge(account, 500)
    shares.leave(account)
    assert shares.join("a", 1.0).level == 0
    assert shares.num_remembered == 0


def test_accounts_without_requests_are_forgotten_past_a_bound() -> None:
    shares = FairShare(100, max_idle=10)
    shares.join("stays", 1.0)
    for number in range(1000):
        account = shares.join(f"key {number}", 1.0)
        shares.charge(account, number)
        shares.leave(account)
        assert shares.num_remembered <= 10
    assert shares.preview("key 999", 1.0).level == 999, "those that had the most are remembered"
    assert shares.preview("key 1", 1.0).level == 0


def test_levels_that_say_nothing_go_first() -> None:
    shares = FairShare(100, max_idle=10)
    stays = shares.join("stays", 1.0)
    for number in range(10):
        account = shares.join(f"low {number}", 1.0)
        shares.charge(account, 1)
        shares.leave(account)
    shares.charge(stays, 5)
    above = shares.join("above", 1.0)
    shares.charge(above, 2)
    shares.leave(above)
    assert shares.num_remembered == 1
    assert shares.preview("above", 1.0).level == 7


def test_a_new_weight_counts_from_the_next_request_on() -> None:
    shares = FairShare(100)
    account = shares.join("a", 1.0)
    shares.charge(account, 10)
    shares.join("a", 10.0)
    shares.charge(account, 10)
    assert account.level == 11
    assert shares.share(account) == 1.0


def test_who_finds_no_room_is_overdue_by_its_share_of_what_is_done_meanwhile() -> None:
    shares = FairShare(100)
    stuck, other = shares.join("stuck", 1.0), shares.join("other", 3.0)
    assert not shares.is_overdue(stuck)
    shares.note_stuck(stuck)
    shares.charge(other, 400)
    shares.note_stuck(stuck)
    assert not shares.is_overdue(stuck)
    shares.charge(other, 1)
    assert shares.is_overdue(stuck)
