"""``POST /v1/estimate``: what a request would cost before it runs."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter
from msgspec import convert
from starlette.requests import Request
from starlette.responses import Response

from service.api import completions, conversation
from service.api.body import OFF_LOOP_BYTES, parse_json, read_body, require_json
from service.api.exchange import exchange_of
from service.api.models import json_response
from service.api.openapi import documented
from service.api.schemas.chat import ChatRequest
from service.api.schemas.completions import CompletionRequest
from service.api.schemas.estimate import AdmissionRefusal, Estimate
from service.api.server import Server, server_of
from service.api.submission import Job
from service.errors import ContextLengthExceeded, InvalidRequest, Overloaded, PronkError

router = APIRouter()


@router.post("/v1/estimate", **documented(CompletionRequest, Estimate, others=(ChatRequest,)))
async def estimate(request: Request) -> Response:
    """What the same body would cost at `/v1/completions` (`prompt`) or
    `/v1/chat/completions` (`messages`) at the present load: tokens, cached tokens, seconds in the
    queue, until its first token and for all `max_new_tokens`; whether it would be admitted.
    """
    server = server_of(request)
    exchange_of(request.scope).is_recorded = True
    fields = await read_either(request)
    model = server.models.get(fields.model, exchange_of(request.scope).caller.models)
    answer = Estimate(model=fields.model or model.name, max_model_len=model.context)
    try:
        job, headers = await prepare(fields, server, request)
    except ContextLengthExceeded as error:
        answer.fits_context = False
        response = json_response(refused(answer, error))
    else:
        response = json_response(await ask(answer, job))
        response.headers.update(headers)
    return response


async def read_either(request: Request) -> CompletionRequest | ChatRequest:
    require_json(request.headers.get("content-type"))
    body = await request.body()
    is_long = len(body) > OFF_LOOP_BYTES
    values: Any = await asyncio.to_thread(parse_json, body) if is_long else parse_json(body)
    named = values if isinstance(values, dict) else {}
    if (named.get("prompt") is None) == (named.get("messages") is None):
        raise InvalidRequest("Send either prompt or messages.", param="prompt")
    is_chat = named.get("messages") is not None
    return await read_body(request, ChatRequest if is_chat else CompletionRequest)


async def prepare(
    fields: CompletionRequest | ChatRequest, server: Server, request: Request
) -> tuple[Job, dict[str, str]]:
    exchange = exchange_of(request.scope)
    if isinstance(fields, ChatRequest):
        chat = await conversation.prepare(fields, server, exchange)
        return chat.job, chat.headers
    return await completions.prepare(fields, server, exchange)


async def ask(answer: Estimate, job: Job) -> Estimate:
    """The engine looks into its books and its prefix cache, and touches neither."""
    answer.prompt_tokens = job.num_prompt_tokens
    answer.max_new_tokens = sum(one.max_tokens for p in job.prompts for one in p.settings)
    try:
        found = await job.engine.estimate(job.asked())
    except (Overloaded, InvalidRequest) as error:
        answer.fits_context = not isinstance(error, ContextLengthExceeded)
        return refused(answer, error)
    answer.cached_tokens = convert(found["cached_tokens"], int)
    answer.queue_seconds = convert(found["queue_seconds"], float)
    answer.prefill_seconds = convert(found["prefill_seconds"], float)
    answer.decode_seconds = convert(found["decode_seconds"], float)
    answer.total_seconds = convert(found["total_seconds"], float)
    return answer


def refused(answer: Estimate, error: PronkError) -> Estimate:
    answer.would_be_admitted = False
    answer.reason = AdmissionRefusal(error.message, error.code, error.retry_after)
    return answer
