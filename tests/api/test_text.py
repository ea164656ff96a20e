"""Stop strings: nothing of one is ever shown, however the text is cut."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from service.api.text import ChoiceText, StopStrings
from service.engine.messages import Output, SamplingSettings

LETTERS = st.text("abc", max_size=40)
STOPS = st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=4)


def first_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The plain rule: the stop string that ends first, the longest of those."""
    for end in range(1, len(text) + 1):
        ended = [stop for stop in stops if text[:end].endswith(stop)]
        if ended:
            longest = max(ended, key=len)
            return text[: end - len(longest)], longest
    return text, None


def cut(text: str, sizes: list[int]) -> list[str]:
    pieces, start = [], 0
    for size in sizes:
        pieces.append(text[start : start + size])
        start += size
    return [*pieces, text[start:]]


@given(LETTERS, STOPS, st.lists(st.integers(0, 5), max_size=20))
@example("ababac", ["abac"], [1, 1, 1, 1, 1, 1])
def test_the_cut_of_the_text_changes_nothing(text: str, stops: list[str], sizes: list[int]) -> None:
    expected, stop = first_stop(text, stops)
    matcher, shown, found = StopStrings(stops), "", None
    for piece in cut(text, sizes):
        part, found = matcher.push(piece)
        shown += part
        assert expected.startswith(shown), "what was shown cannot be taken back"
        if found:
            break
    if not found:
        shown += matcher.flush()
    assert (shown, found) == (expected, stop)


def test_included_stop_strings_end_the_text() -> None:
    assert StopStrings(["STOP"], include=True).push("a STOP b") == ("a STOP", "STOP")


def test_a_stop_string_counts_only_once_it_is_armed() -> None:
    matcher = StopStrings(["ab"])
    assert matcher.push("xab", armed=False) == ("xab", None)
    assert matcher.push("a", armed=False) == ("", None)
    assert matcher.push("b") == ("", "ab")


class Letters:
    """A detokenizer of one character a token."""

    def push(self, token: int) -> str:
        return chr(token)

    def flush(self) -> str:
        return ""


def output(text: str, finish_reason: str | None = None) -> Output:
    return Output(id=1, choice=0, tokens=[ord(c) for c in text], finish_reason=finish_reason)


def test_tokens_count_to_the_one_that_completed_the_stop_string() -> None:
    choice = ChoiceText(0, SamplingSettings(), Letters(), StopStrings(["cd"]))
    event = choice.push(output("abcdef"))
    assert (event.text, event.finish_reason, event.stop_reason) == ("ab", "stop", "cd")
    assert event.num_tokens == 4
    assert choice.is_finished


def test_an_end_token_is_no_part_of_the_text() -> None:
    settings = SamplingSettings(eos_token_ids=(ord("!"),))
    choice = ChoiceText(0, settings, Letters(), StopStrings([]))
    event = choice.push(output("ab!", "stop"))
    assert (event.text, event.num_tokens, event.stop_reason) == ("ab", 3, None)


def test_what_was_held_back_is_shown_when_the_budget_ends_the_text() -> None:
    choice = ChoiceText(0, SamplingSettings(), Letters(), StopStrings(["STOP"]))
    assert choice.push(output("xST")).text == "x"
    assert choice.push(output("O", "length")).text == "STO"
