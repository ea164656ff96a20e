from __future__ import annotations

import json
import time
from collections.abc import Iterator

import pytest

from model.grammar import Grammar, GrammarError, Vocabulary
from service.engine import grammar_desk
from service.engine.grammar_desk import GrammarDesk
from service.engine.grammar_trial import TOO_COMPLEX, GrammarTrial
from service.engine.messages import SamplingSettings, Submit
from service.errors import GrammarRefused, Overloaded
from tests.model.test_grammar import lark

ENDLESS = lark('start: %json {"type": "integer", "multipleOf": 999983}')
BYTES = [bytes([byte]) for byte in range(256)]


def submit(grammar: str, id: int = 1) -> Submit:
    return Submit(id=id, prompt=[1], settings=[SamplingSettings()], grammar=grammar)


@pytest.fixture(scope="module")
def trial() -> Iterator[GrammarTrial]:
    trial = GrammarTrial()
    yield trial
    trial.close()


@pytest.fixture
def desk() -> Iterator[GrammarDesk]:
    desk = GrammarDesk(lambda: Vocabulary(BYTES))
    yield desk
    desk.close()


def compiled(desk: GrammarDesk, seconds: float = 30) -> list[tuple[int, Submit, object]]:
    give_up = time.monotonic() + seconds
    while time.monotonic() < give_up:
        if found := desk.finished():
            return found
        time.sleep(0.005)
    raise AssertionError("nothing was compiled")


def test_a_grammar_without_end_is_given_up_in_time_and_the_next_one_is_compiled(
    trial: GrammarTrial,
) -> None:
    assert trial.run(lark("start: /a/")) == lark("start: /a/")
    began = time.monotonic()
    with pytest.raises(GrammarError, match=TOO_COMPLEX):
        trial.run(ENDLESS, seconds=0.5)
    assert time.monotonic() - began < 10  # it would take minutes
    assert trial.run(lark("start: /b/")) == lark("start: /b/")


def test_gbnf_becomes_lark(trial: GrammarTrial) -> None:
    gbnf = 'root ::= word ("," word)*\nword ::= [a-z]+'
    made = Grammar(trial.run(json.dumps({"gbnf": gbnf})), Vocabulary(BYTES))
    state = made.start()
    state.take(list(b"ab,cd"))
    assert state.may_end
    assert not state.can_take(ord("1"))


@pytest.mark.parametrize("gbnf", ["root ::= foo", "root ::= (", "root ::= " + "(" * 9000, "x"])
def test_bad_gbnf_is_refused(trial: GrammarTrial, gbnf: str) -> None:
    with pytest.raises(GrammarError) as caught:
        trial.run(json.dumps({"gbnf": gbnf}))
    assert len(str(caught.value)) < 400


def test_a_grammar_is_compiled_once(desk: GrammarDesk, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(
        grammar_desk, "Grammar", lambda *arguments: made.append(1) or Grammar(*arguments)
    )
    text = lark("start: /abc/")
    assert desk.get(0, submit(text, 1)) is None
    assert desk.get(1, submit(text, 2)) is None
    found = compiled(desk)
    while len(found) < 2:
        found += compiled(desk)
    assert [(front_end, one.id) for front_end, one, _ in found] == [(0, 1), (1, 2)]
    assert desk.get(2, submit(text, 3)) is found[0][2]
    assert not desk.is_busy
    assert len(made) == 1


def test_what_was_refused_is_refused_at_once(desk: GrammarDesk) -> None:
    text = lark("start: foo")
    assert desk.get(0, submit(text)) is None
    ((_, _, answer),) = compiled(desk)
    assert isinstance(answer, GrammarRefused)
    with pytest.raises(GrammarRefused, match="unknown name"):
        desk.get(0, submit(text, 2))


def test_an_endless_grammar_takes_nobody_elses_turn(desk: GrammarDesk) -> None:
    desk.get(0, submit(lark("start: /a/"), 0))
    compiled(desk)
    desk.get(0, submit(ENDLESS, 1))
    desk.get(0, submit(lark("start: /b/"), 2))
    ((_, first, answer),) = compiled(desk)
    assert first.id == 2
    assert isinstance(answer, Grammar)
    ((_, second, refused),) = compiled(desk)
    assert second.id == 1
    assert isinstance(refused, GrammarRefused)


def test_who_waits_too_long_may_try_again(
    desk: GrammarDesk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_desk, "PATIENCE", 0.0)
    desk.get(0, submit(ENDLESS))
    time.sleep(0.01)
    ((_, _, answer),) = desk.finished()
    assert isinstance(answer, Overloaded)
    assert answer.retry_after


def test_more_than_so_many_do_not_wait(desk: GrammarDesk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_desk, "MOST_WAITING", 1)
    desk.get(0, submit(ENDLESS))
    with pytest.raises(Overloaded):
        desk.get(0, submit(lark("start: /c/"), 2))


def test_who_has_left_is_not_answered(desk: GrammarDesk) -> None:
    text = lark("start: /left/")
    for front_end, id in ((0, 1), (0, 2), (1, 1), (1, 3)):
        desk.get(front_end, submit(text, id))
    desk.cancel(0, 1)
    desk.cancel(1)
    found = compiled(desk)
    assert [(front_end, one.id) for front_end, one, _ in found] == [(0, 2)]
    assert not desk.is_busy


def test_a_model_without_a_tokenizer_refuses_grammars() -> None:
    def load() -> Vocabulary:
        raise ValueError("no tokenizer")

    desk = GrammarDesk(load)
    desk.get(0, submit(lark("start: /a/")))
    ((_, _, answer),) = compiled(desk)
    assert isinstance(answer, GrammarRefused)
    desk.close()


def test_only_so_many_are_remembered(desk: GrammarDesk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_desk, "MOST_KNOWN", 2)
    for number in range(3):
        desk.get(0, submit(lark(f"start: /{number}/"), number))
        compiled(desk)
    assert desk.get(0, submit(lark("start: /2/"), 5)) is not None
    assert desk.get(0, submit(lark("start: /0/"), 6)) is None
