"""``POST /v1/score`` and ``/v1/rerank``: how likely one text is after another.

The score is exp of the mean log-likelihood of the second text's tokens, each given all before it: a
number in (0, 1], 1 where the model is sure of every token. It orders texts; it is no probability of
relevance. Ranking asks how likely the query is after the document and a line break.
"""

from __future__ import annotations

import math
import secrets
import sys
import time

from fastapi import APIRouter
from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from service.api.body import read_body
from service.api.openapi import documented
from service.api.prompts import off_loop
from service.api.schemas.pooling import (
    Ranked,
    RankedDocument,
    Ranking,
    RerankRequest,
    Score,
    ScoreList,
    ScoreRequest,
    TextUsage,
)
from service.api.server import server_of
from service.api.submission import Prompt
from service.api.text import Event
from service.api.text_jobs import NOTHING_DRAWN, TextQuestion
from service.errors import InvalidRequest

router = APIRouter()
BETWEEN = "\n"  # document and query


@router.post("/v1/score", **documented(ScoreRequest, ScoreList))
@router.post("/score", **documented(ScoreRequest, ScoreList))
async def score(request: Request) -> Response:
    """exp of the mean log-likelihood of `text_2` after `text_1`: one to one, to many, or pairs."""
    server = server_of(request)
    exchange = server.receive(request)
    fields = await read_body(request, ScoreRequest)
    question = TextQuestion(request, exchange, fields)
    pairs = pair(fields)
    question.check_count(len(pairs), "text_2")
    names = ("text_1", "text_2")

    def write(events: list[Event], usage: TextUsage) -> ScoreList:
        return ScoreList(
            id=f"score-{secrets.token_hex(16)}",
            created=int(time.time()),
            model=question.name,
            data=[Score(event.index, likelihood(event)) for event in events],
            usage=usage,
        )

    prompts = await read_pairs(question, pairs, names)
    return question.answer(prompts, write, prompt_logprobs=0)


@router.post("/v1/rerank", **documented(RerankRequest, Ranking))
@router.post("/v2/rerank", **documented(RerankRequest, Ranking))
@router.post("/rerank", **documented(RerankRequest, Ranking))
async def rerank(request: Request) -> Response:
    """Documents by how likely the query is after each: exp of its tokens' mean log-likelihood."""
    server = server_of(request)
    exchange = server.receive(request)
    fields = await read_body(request, RerankRequest)
    question = TextQuestion(request, exchange, fields)
    question.check_count(len(fields.documents), "documents")
    pairs = [(document + BETWEEN, fields.query) for document in fields.documents]

    def write(events: list[Event], usage: TextUsage) -> Ranking:
        scores = [(likelihood(event), event.index) for event in events]
        ranked = sorted(scores, key=lambda one: one[0], reverse=True)  # equals in their order
        return Ranking(
            id=f"rerank-{secrets.token_hex(16)}",
            model=question.name,
            results=[ranked_document(fields, *one) for one in ranked[: fields.top_n]],
            usage=usage,
        )

    prompts = await read_pairs(question, pairs, ("documents", "query"))
    return question.answer(prompts, write, prompt_logprobs=0)


def ranked_document(fields: RerankRequest, score: float, index: int) -> Ranked:
    shows = fields.return_documents is not False
    return Ranked(index, score, RankedDocument(fields.documents[index]) if shows else UNSET)


def pair(fields: ScoreRequest) -> list[tuple[str, str]]:
    first, second = fields.text_1, fields.text_2
    if len(first) == 1:
        first = first * len(second)
    if len(first) != len(second):
        raise InvalidRequest(
            f"text_1: {len(first)} texts and {len(second)} in text_2; send one, or as many",
            param="text_1",
        )
    return list(zip(first, second, strict=True))


async def read_pairs(
    question: TextQuestion, pairs: list[tuple[str, str]], names: tuple[str, str]
) -> list[Prompt]:
    """Both as one prompt; where it is too long the first is cut, the second never."""

    def read(number: int) -> Prompt:
        first, second = pairs[number]
        given = question.encode(first, names[0])
        judged = question.encode(second, names[1], begins=False)
        if not judged:
            raise InvalidRequest(f"{names[1]}: spells no token", param=names[1])
        given = question.truncated(given, len(judged), names[0])
        if not given:
            raise InvalidRequest(f"{names[0]}: spells no token", param=names[0])
        return Prompt([*given, *judged], [NOTHING_DRAWN], logprobs_from=len(given))

    size = sum(len(first) + len(second) for first, second in pairs)
    return await off_loop(size, lambda: [read(number) for number in range(len(pairs))])


def likelihood(event: Event) -> float:
    """Of the tokens whose log-probability was asked for, in (0, 1]."""
    known = [one.logprob for one in event.prompt_logprobs or () if one is not None]
    assert known, "asked for"
    return max(sys.float_info.min, math.exp(min(0.0, math.fsum(known) / len(known))))
