"""An answer's parts: in order, the same however the engine's outputs were grouped."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from service.api.parts import AnswerParts, Change, Part
from service.api.text import Event, TokenNews
from tests.api.fakes import fake_logprob
from tests.api.toy_reader import ToyReader


def events_of(pieces: list[str], sizes: list[int]) -> list[Event]:
    """One token a piece, so many in each event."""
    events, offset, rest = [], 0, list(enumerate(pieces))
    for size in [*sizes, len(pieces) + 1]:
        event = Event(0, is_first=not events)
        for number, piece in rest[:size]:
            event.pieces.append(piece)
            event.logprobs.append(TokenNews(number, fake_logprob(number), offset))
            offset += len(piece)
        rest = rest[size:]
        events.append(event)
    events[-1].finish_reason = "stop"
    return events


def read(events: list[Event]) -> tuple[list[Part], list[Change]]:
    parts = AnswerParts(ToyReader())
    changes = [change for event in events for change in parts.push(event)]
    return parts.parts, changes


def told(parts: list[Part]) -> list[tuple[str, str, list[int]]]:
    return [(part.kind, part.text, [news.token for news in part.logprobs]) for part in parts]


def test_parts_stand_in_the_order_of_the_text() -> None:
    parts, _ = read(events_of(list("(hm)a[f:{}][g:1]b"), []))
    assert [(part.kind, part.text) for part in parts] == [
        ("reasoning", "hm"),
        ("text", "a"),
        ("call", "{}"),
        ("call", "1"),
        ("text", "b"),
    ]
    assert [part.call.name for part in parts if part.call] == ["f", "g"]
    assert parts[2].call is not None
    assert parts[2].call.id == "call_0"


def test_an_answer_that_says_nothing_is_an_empty_text() -> None:
    parts, changes = read(events_of([], []))
    assert told(parts) == [("text", "", [])]
    assert [change.what for change in changes] == ["opened", "closed"]


def test_a_call_that_breaks_is_not_kept_and_its_text_is() -> None:
    events = events_of(list("a[f:{!b"), [1] * 5)
    parts = AnswerParts(ToyReader())
    changes = [change for event in events for change in parts.push(event)]
    assert [part.text for part in parts.kept] == ["a", "!b"]
    assert [change.what for change in changes if change.part.kind == "call"] == [
        "opened",
        "grew",
        "closed",
    ]


def test_logprobs_belong_to_the_text_their_tokens_stand_in() -> None:
    parts, _ = read(events_of(["(hm)", "a", "b", "[f:", "{}", "]", "c", ""], [3, 2]))
    assert told(parts) == [
        ("reasoning", "hm", []),
        ("text", "ab", [1, 2]),
        ("call", "{}", []),
        ("text", "c", [5, 6, 7]),
    ]


PIECES = st.lists(st.text("ab([])f:!", max_size=4), max_size=20)


@given(pieces=PIECES, sizes=st.lists(st.integers(0, 4), max_size=8))
def test_grouping_changes_nothing(pieces: list[str], sizes: list[int]) -> None:
    whole, _ = read(events_of(pieces, []))
    grouped, changes = read(events_of(pieces, sizes))
    assert told(grouped) == told(whole)
    grown = {part.index: "" for part in grouped}
    logprobs: dict[int, int] = {part.index: 0 for part in grouped}
    open_part = None
    for change in changes:
        match change.what:
            case "opened":
                assert open_part is None
                open_part = change.part.index
            case "grew":
                assert open_part == change.part.index
                grown[change.part.index] += change.text
                logprobs[change.part.index] += len(change.logprobs)
            case "closed":
                assert open_part == change.part.index
                open_part = None
    assert open_part is None
    assert grown == {part.index: part.text for part in grouped}
    assert all(logprobs[part.index] <= len(part.logprobs) for part in grouped)
