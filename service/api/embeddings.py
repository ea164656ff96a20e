"""``POST /v1/embeddings``: a text's final hidden states, pooled, of length 1."""

from __future__ import annotations

import base64
import math
import sys
from array import array

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from service.api.body import read_body
from service.api.openapi import documented
from service.api.prompts import off_loop
from service.api.schemas.pooling import Embedding, EmbeddingList, EmbeddingRequest, TextUsage
from service.api.server import server_of
from service.api.submission import Prompt
from service.api.text import Event
from service.api.text_jobs import NOTHING_DRAWN, TextQuestion
from service.errors import InvalidRequest

router = APIRouter()


@router.post("/v1/embeddings", **documented(EmbeddingRequest, EmbeddingList))
async def create_embeddings(request: Request) -> Response:
    """A vector for each input: the mean of the text's final hidden states, or the last token's."""
    server = server_of(request)
    exchange = server.receive(request)
    fields = await read_body(request, EmbeddingRequest)
    if fields.input is None:
        raise InvalidRequest("input: is required", param="input")
    question = TextQuestion(request, exchange, fields)
    question.check_count(len(fields.input), "input")
    check_dimensions(fields.dimensions, question.model.hidden_size)

    def read() -> list[Prompt]:
        return [read_input(question, fields, number) for number in range(len(fields.input))]

    prompts = await off_loop(sum(map(len, fields.input)), read)

    def write(events: list[Event], usage: TextUsage) -> EmbeddingList:
        data = [Embedding(event.index, embedding(fields, event.pooled or b"")) for event in events]
        return EmbeddingList(data=data, model=question.name, usage=usage)

    return question.answer(prompts, write, pooling=fields.pooling or server.settings.pooling)


def read_input(question: TextQuestion, fields: EmbeddingRequest, number: int) -> Prompt:
    param = "input" if len(fields.input) == 1 else f"input[{number}]"
    ids = question.truncated(question.encode(fields.input[number], param), 0, param)
    if not ids:
        raise InvalidRequest(f"{param}: spells no token", param=param)
    return Prompt(ids, [NOTHING_DRAWN])


def check_dimensions(dimensions: int | None, size: int | None) -> None:
    if dimensions is not None and size is not None and dimensions > size:
        raise InvalidRequest(
            f"dimensions: this model's embeddings have {size}, at most", param="dimensions"
        )


def embedding(fields: EmbeddingRequest, pooled: bytes) -> list[float] | str:
    """Of length 1; of fewer dimensions the first ones, of length 1 again."""
    values = array("f", pooled)
    if sys.byteorder == "big":
        values.byteswap()
    check_dimensions(fields.dimensions, len(values))
    values = unit(values[: fields.dimensions])
    if fields.encoding_format != "base64":
        return [float(f"{value:.9g}") for value in values]  # as many digits as float32 has
    if sys.byteorder == "big":
        values.byteswap()
    return base64.b64encode(values.tobytes()).decode("ascii")


def unit(values: array[float]) -> array[float]:
    length = math.sqrt(math.fsum(value * value for value in values))
    return array("f", [value / length for value in values]) if length else values
