"""Prompt lookup: what followed the last few tokens where they stood before is proposed again."""

from __future__ import annotations

from array import array

LOOKED_AT = 16  # earlier places at most, the newest first
CATCH_UP = 8192  # tokens read into the index in one step: a long prompt takes a few


class PromptLookup:
    """An index over one growing list of tokens; a step costs what is new, not what is there.

    Every place is chained to the newest one before it that ends in the same ``least`` tokens, as in
    LZ77. The place that agrees in most tokens (up to ``most``) wins, among those the newest.
    """

    __slots__ = ("_earlier", "_least", "_most", "_newest")

    def __init__(self, least: int, most: int) -> None:
        assert 1 <= least <= most, "no length to look for"
        self._least, self._most = least, most
        self._newest: dict[tuple[int, ...], int] = {}  # ending: where it stood last
        self._earlier = array("q")  # [place - least]: the place before with its ending, or -1

    def propose(self, tokens: list[int], count: int) -> list[int]:
        """``count`` tokens that may follow, or none where nothing like the end was said before."""
        if not self._catch_up(tokens):
            return []
        place = self._best_place(tokens)
        if place < 0:
            return []
        followed = tokens[place : place + count]
        # A match that reaches into the end itself is a loop: it goes on as it went.
        return [followed[i % len(followed)] for i in range(count)]

    def _catch_up(self, tokens: list[int]) -> bool:
        """Whether every token is in the index now."""
        least, newest, earlier = self._least, self._newest, self._earlier
        first = least + len(earlier)
        end = min(len(tokens) + 1, first + CATCH_UP)
        for place in range(first, end):
            ending = tuple(tokens[place - least : place])
            earlier.append(newest.get(ending, -1))
            newest[ending] = place
        return 0 < len(earlier) == len(tokens) + 1 - least

    def _best_place(self, tokens: list[int]) -> int:
        best, longest = -1, 0
        place = self._earlier[len(tokens) - self._least]
        for _ in range(LOOKED_AT):
            if place < 0 or longest == self._most:
                break
            length = self._agreement(tokens, place)
            if length > longest:
                best, longest = place, length
            place = self._earlier[place - self._least]
        return best

    def _agreement(self, tokens: list[int], place: int) -> int:
        """How many tokens before ``place`` are those at the end, from ``least`` to ``most``."""
        length, end = self._least, len(tokens)
        most = min(self._most, place)
        while length < most and tokens[place - length - 1] == tokens[end - length - 1]:
            length += 1
        return length
