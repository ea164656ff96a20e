"""``/v1/score`` and ``/v1/rerank``: likelihoods of the network itself, in the peers' shapes."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import pytest_asyncio

from tests.api.fakes import BOS, FakeEngine
from tests.api.tiny import Tiny, tiny_checkpoint, tiny_server

real = pytest.mark.asyncio(loop_scope="module")
DOCUMENTS = ["The sea was calm that day. " * 4, "A king", "Of bread and butter, and more of it"]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def tiny() -> AsyncIterator[Tiny]:
    with tiny_checkpoint() as (path, network):
        async with tiny_server(path, network) as tiny:
            yield tiny


def expected(tiny: Tiny, given: bytes, judged: bytes) -> float:
    ids = [BOS, *given, *judged]
    logprobs = tiny.logprobs(ids)
    first = 1 + len(given)
    values = [float(logprobs[i - 1, ids[i]]) for i in range(first, len(ids))]
    return math.exp(sum(values) / len(values))


@real
async def test_a_score_is_the_mean_likelihood_of_the_second_text(tiny: Tiny) -> None:
    answer = await tiny.ask("/v1/score", text_1="What is the", text_2=["sea", "king and queen"])
    for index, text in enumerate((b"sea", b"king and queen")):
        one = answer["data"][index]
        assert (one["index"], one["object"]) == (index, "score")
        assert one["score"] == pytest.approx(expected(tiny, b"What is the", text), rel=1e-3)
        assert 0 < one["score"] <= 1
    assert answer["object"] == "list"
    count = 2 * (1 + 11) + 3 + 14
    assert answer["usage"] == {"prompt_tokens": count, "total_tokens": count}


@real
async def test_scores_are_the_same_with_the_first_text_in_the_cache(tiny: Tiny) -> None:
    """Long enough that pages of it are read, and that its last chunk is cut."""
    first = "Once there was an old man who lived by the sea. " * 4
    for _ in range(2):
        answer = await tiny.ask("/v1/score", text_1=[first] * 2, text_2=["He had a boat.", "No."])
        for one, text in zip(answer["data"], (b"He had a boat.", b"No."), strict=True):
            wanted = expected(tiny, first.encode(), text)
            assert one["score"] == pytest.approx(wanted, rel=1e-3)


@real
@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank", "/rerank"])
async def test_documents_are_ranked_by_the_querys_likelihood(tiny: Tiny, path: str) -> None:
    answer = await tiny.ask(path, query="ships", documents=[*DOCUMENTS, {"text": "salt"}])
    scores = [
        expected(tiny, document.encode() + b"\n", b"ships") for document in [*DOCUMENTS, "salt"]
    ]
    order = sorted(range(4), key=lambda index: -scores[index])
    assert [one["index"] for one in answer["results"]] == order
    for one in answer["results"]:
        assert one["relevance_score"] == pytest.approx(scores[one["index"]], rel=1e-3)
        assert one["document"] == {"text": [*DOCUMENTS, "salt"][one["index"]]}


@real
async def test_only_the_first_are_shown_and_documents_may_stay_out(tiny: Tiny) -> None:
    answer = await tiny.ask(
        "/v1/rerank", query="ships", documents=DOCUMENTS, top_n=2, return_documents=False
    )
    assert [sorted(one) for one in answer["results"]] == [["index", "relevance_score"]] * 2


@real
async def test_only_the_document_is_cut(tiny: Tiny) -> None:
    fields = {"query": "ships", "documents": [DOCUMENTS[0]], "truncate_prompt_tokens": 12}
    answer = await tiny.ask("/v1/rerank", **fields)
    wanted = expected(tiny, DOCUMENTS[0].encode()[:6], b"ships")
    assert answer["results"][0]["relevance_score"] == pytest.approx(wanted, rel=1e-3)
    assert answer["usage"]["prompt_tokens"] == 12


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/v1/score", {"text_1": "a"}, "text_2"),
        ("/v1/score", {"text_1": "", "text_2": "b"}, "text_1"),
        ("/v1/score", {"text_1": ["a", "b"], "text_2": ["c"]}, "text_1"),
        ("/v1/score", {"text_1": "a", "text_2": ["c", 1]}, "text_2"),
        ("/v1/rerank", {"query": "", "documents": ["a"]}, "query"),
        ("/v1/rerank", {"query": "q", "documents": []}, "documents"),
        ("/v1/rerank", {"query": "q", "documents": "a"}, "documents"),
        ("/v1/rerank", {"query": "q", "documents": [{"image": "x"}]}, "documents"),
        ("/v1/rerank", {"query": "q", "documents": ["a"], "top_n": 0}, "top_n"),
        ("/v1/rerank", {"query": "q" * 250, "documents": ["a"]}, "documents"),
        (
            "/v1/rerank",
            {"query": "qqqq", "documents": ["a"], "truncate_prompt_tokens": 4},
            "truncate_prompt_tokens",
        ),
    ],
)
async def test_wrong_requests_name_their_field(
    client: httpx.AsyncClient, path: str, fields: dict[str, Any], param: str
) -> None:
    response = await client.post(path, json=fields)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


async def test_logprobs_are_asked_for_from_the_second_text_on(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    await client.post("/v1/score", json={"text_1": "abc", "text_2": "de"})
    (submitted,) = engine.submitted
    assert (submitted["prompt_logprobs"], submitted["logprobs_from"]) == (0, 4)
    assert submitted["prompt"] == [BOS, *b"abcde"]
