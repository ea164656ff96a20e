"""Who is suspected after an engine's death, who is convicted, and for how long."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from service.engine import quarantine as module
from service.engine.messages import SamplingSettings, Submit
from service.engine.quarantine import MOST, REFUSED_FOR, Quarantine
from service.errors import PoisonRequest


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def ask(number: int, **fields: object) -> Submit:
    return Submit(number, [number, 1, 2], [SamplingSettings(seed=number)], **fields)  # type: ignore[arg-type]


def is_refused(quarantine: Quarantine, submit: Submit) -> bool:
    try:
        quarantine.refuse_convicted(submit)
    except PoisonRequest:
        return True
    return False


def die(quarantine: Quarantine, *numbers: int, progress: int = 0) -> bool:
    return quarantine.note_death((ask(number), progress) for number in numbers)


def test_one_death_makes_suspects_and_a_second_one_alone_convicts() -> None:
    quarantine = Quarantine()
    assert die(quarantine, 1, 2, 3)
    assert not any(is_refused(quarantine, ask(number)) for number in (1, 2, 3))
    assert not die(quarantine, 2)
    assert [is_refused(quarantine, ask(number)) for number in (1, 2, 3)] == [False, True, False]
    assert (quarantine.num_convicted, quarantine.num_refused) == (1, 1)


def test_a_death_that_has_a_culprit_makes_nobody_else_a_suspect() -> None:
    quarantine = Quarantine()
    die(quarantine, 1, 2)
    quarantine.note_passed(ask(1))  # since then it has come further
    assert not die(quarantine, 1, 2, 7)
    assert is_refused(quarantine, ask(2))
    assert not is_refused(quarantine, ask(1))
    assert quarantine.find(ask(7)) is None
    die(quarantine, 1)
    assert is_refused(quarantine, ask(1)), "on its own it has no excuse"


def test_who_has_passed_is_not_convicted_for_a_death_in_the_company_of_strangers() -> None:
    quarantine = Quarantine()
    die(quarantine, 1, 2)
    quarantine.note_passed(ask(1))
    assert die(quarantine, 1, 7, 8), "all of them are suspects: the engine may have been killed"
    assert not any(is_refused(quarantine, ask(number)) for number in (1, 7, 8))
    die(quarantine, 1, 9)
    assert is_refused(quarantine, ask(1)), "the third time, before it had passed"


def test_two_suspects_that_die_together_twice_are_convicted_the_third_time() -> None:
    quarantine = Quarantine()
    for _ in range(2):
        assert die(quarantine, 1, 2)
        assert not is_refused(quarantine, ask(1))
    die(quarantine, 1, 2)
    assert is_refused(quarantine, ask(1))
    assert is_refused(quarantine, ask(2))


def test_nobody_at_hand_means_no_suspect() -> None:
    quarantine = Quarantine()
    assert not die(quarantine)
    assert len(quarantine) == 0


def test_who_ends_well_is_forgotten() -> None:
    quarantine = Quarantine()
    die(quarantine, 1, progress=8)
    record = quarantine.find(ask(1))
    assert record is not None
    assert record.progress == 8
    quarantine.acquit(ask(1))
    die(quarantine, 1)
    assert not is_refused(quarantine, ask(1))


def test_a_conviction_lasts_for_a_while() -> None:
    clock = Clock()
    quarantine = Quarantine(clock)
    die(quarantine, 1)
    clock.now = REFUSED_FOR - 1
    die(quarantine, 1)
    clock.now += REFUSED_FOR - 1
    assert is_refused(quarantine, ask(1))
    clock.now += 2
    assert not is_refused(quarantine, ask(1))
    assert len(quarantine) == 0


def test_the_table_is_bounded_and_the_latest_stay() -> None:
    quarantine = Quarantine()
    for number in range(MOST + 50):
        die(quarantine, number)
    assert len(quarantine) == MOST
    assert quarantine.find(ask(MOST + 49)) is not None
    assert quarantine.find(ask(0)) is None


@pytest.mark.parametrize(
    ("change", "is_same"),
    [
        ({"id": 99, "request_id": "x", "namespace": b"other", "deadline": 3.0}, True),
        ({"settings": [SamplingSettings(seed=77)]}, True),  # the server draws it
        ({"settings": [SamplingSettings(seed=1, temperature=0.5)]}, False),
        ({"prompt": [1, 1, 3]}, False),
        ({"account": "another"}, False),  # nobody learns of what others sent
        ({"adapter": "one"}, False),
    ],
)
def test_a_request_is_known_by_what_it_asks_for_and_by_its_account(
    change: dict[str, object], is_same: bool
) -> None:
    quarantine = Quarantine()
    die(quarantine, 1)
    die(quarantine, 1)
    assert is_refused(quarantine, replace(ask(1), **change)) is is_same


def test_names_are_of_one_process_alone_and_hold_no_content() -> None:
    submit = ask(1)
    names = {Quarantine()._name(submit) for _ in range(3)}
    assert len(names) == 3
    assert {len(name) for name in names} == {32}
    assert "for 10 minutes" in str(_refusal())
    assert module.FATAL < module.FATAL_IN_COMPANY


def _refusal() -> PoisonRequest:
    quarantine = Quarantine()
    die(quarantine, 1)
    die(quarantine, 1)
    with pytest.raises(PoisonRequest) as refusal:
        quarantine.refuse_convicted(ask(1))
    return refusal.value
