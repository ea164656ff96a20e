"""Other projects' clients, unchanged: what they send is taken, what they read is there."""

from __future__ import annotations

import json

import pytest

from tests.api.fakes import FakeEngine, say
from tests.clients.conftest import Run

pytestmark = pytest.mark.clients
HELLO = "Hello, world"


def test_the_openai_package_of_npm(run_node: Run) -> None:
    found = run_node("openai_node.mjs")
    assert found.pop("requestId").startswith("req-")
    pieces = found.pop("pieces")
    assert len(pieces) > 5
    assert "".join(pieces) == HELLO
    assert found == {
        "completion": HELLO,
        "usage": 16,
        "chat": [HELLO, HELLO],
        "final": HELLO,
        "models": ["tiny", "org/alias"],
        "errors": [
            ["BadRequestError", 400, None, "temperature"],
            ["NotFoundError", 404, "model_not_found", "model"],
        ],
    }


def test_langchain(run_python: Run) -> None:
    found = run_python("langchain_client.py", "langchain_openai")
    assert found.pop("num_pieces") > 5
    assert found.pop("tokens") > 13
    assert found == {
        "answer": HELLO,
        "finish": "stop",
        "streamed": HELLO,
        "streamed_tokens": 13,
        "batch": [HELLO] * 3,
        "logprobs": 13,
        "completion": HELLO,
    }


def test_litellm(run_python: Run) -> None:
    found = run_python("litellm_client.py", "litellm")
    assert "".join(found.pop("pieces")) == HELLO
    assert found.pop("tokens") > 13
    assert found == {"answer": HELLO, "text": HELLO, "refused": 400, "many": [HELLO] * 8}


def test_instructor_reads_json_out_of_a_text(run_python: Run, engine: FakeEngine) -> None:
    """The mode that asks the server for nothing: the schema stands in the prompt."""
    ada = {"name": "Ada", "age": 36}
    engine.script = lambda prompt, one: say(f"```json\n{json.dumps(ada)}\n```")
    assert run_python("instructor_client.py", "instructor", "MD_JSON") == ada


def test_lm_eval(run_python: Run) -> None:
    """Answers up to a stop string; its log-likelihood tasks would need transformers' tokenizers."""
    assert run_python("lm_eval_client.py", "lm_eval") == {"score": 0.75, "answers": ["Hello"] * 4}
