"""What ``pronk chat`` makes of answers that fail."""

from __future__ import annotations

import io
import json

import httpx
import pytest
from rich.console import Console

from service.chat import ChatProblem, ChatSettings, _talk

BROKEN = 'data: {"error": {"message": "the engine failed while it answered: try again"}}\n\n'
WHOLE = 'data: {"choices": [{"delta": {"content": "hello"}}]}\n\ndata: [DONE]\n\n'


def talk(lines: list[str], answers: list[tuple[int, str]]) -> tuple[str, list[list[str]]]:
    """What was printed, and the contents of the messages of each request."""
    asked: list[list[str]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append([one["content"] for one in json.loads(request.content)["messages"]])
        status, text = answers[len(asked) - 1]
        return httpx.Response(status, text=text)

    console = Console(file=io.StringIO(), width=200)
    left = iter([*lines, ""])
    console.input = lambda prompt: next(left)  # type: ignore[method-assign,assignment]
    settings = ChatSettings(None, "http://x", "", None, None, None)
    with httpx.Client(transport=httpx.MockTransport(answer), base_url="http://x") as client:
        _talk(client, settings, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue(), asked


@pytest.mark.parametrize(
    "failure", [(200, BROKEN), (503, '{"error": {"message": "the engine is being restarted"}}')]
)
def test_an_answer_that_fails_costs_its_line_and_not_the_conversation(
    failure: tuple[int, str],
) -> None:
    printed, asked = talk(["one", "two", "two"], [(200, WHOLE), failure, (200, WHOLE)])
    assert "the engine" in printed
    assert asked == [["one"], ["one", "hello", "two"], ["one", "hello", "two"]]


def test_a_wrong_key_ends_it() -> None:
    with pytest.raises(ChatProblem, match="no such key"):
        talk(["one"], [(401, '{"error": {"message": "no such key"}}')])
