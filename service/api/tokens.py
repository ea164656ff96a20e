"""``POST /tokenize`` and ``/detokenize``."""

from __future__ import annotations

from fastapi import APIRouter
from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from service.api.body import read_body
from service.api.exchange import exchange_of
from service.api.ignored import ignored_headers, refuse_unsupported
from service.api.models import json_response
from service.api.openapi import documented
from service.api.prompts import encode, encode_chat, off_loop
from service.api.sampling import check_ids
from service.api.schemas.tokens import Detokenized, DetokenizeRequest, Tokenized, TokenizeRequest
from service.api.server import Server, server_of
from service.api.tools import read_tools
from service.errors import InvalidRequest
from service.registry import ServedModel

router = APIRouter()


@router.post("/tokenize", **documented(TokenizeRequest, Tokenized))
async def tokenize(request: Request) -> Response:
    """The ids of a prompt, or of a conversation as the chat template writes it."""
    server = server_of(request)
    fields = await read_body(request, TokenizeRequest)
    refuse_unsupported(fields)
    model = server.models.get(fields.model, exchange_of(request.scope).caller.models)
    headers = ignored_headers(fields, server.settings.strict_params)
    if model.tokenizer is None:
        raise model.unavailable()
    ids = await read_ids(fields, server, model)
    texts = [model.tokenizer.token_text(token) for token in ids]
    answer = Tokenized(len(ids), model.context, ids, texts if fields.return_token_strs else UNSET)
    response = json_response(answer)
    response.headers.update(headers)
    return response


async def read_ids(fields: TokenizeRequest, server: Server, model: ServedModel) -> list[int]:
    prompt, tokenizer = fields.prompt, model.tokenizer
    if (prompt is None) == (fields.messages is None):
        raise InvalidRequest("Send either prompt or messages.", param="prompt")
    if fields.messages is not None:
        return await encode_chat(
            fields.messages,
            fields,
            model,
            allow_template=server.settings.allow_request_chat_template,
            add_special_tokens=bool(fields.add_special_tokens),
            tools=read_tools(fields.tools),
            tool_call_parser=server.settings.tool_call_parser,
        )
    assert prompt is not None
    assert tokenizer is not None
    special = fields.add_special_tokens is not False
    parse = fields.parse_special_tokens is not False
    return await off_loop(
        len(prompt), lambda: encode(prompt, tokenizer, special=special, parse=parse)
    )


@router.post("/detokenize", **documented(DetokenizeRequest, Detokenized))
async def detokenize(request: Request) -> Response:
    """The text of ids, special tokens spelled out."""
    server = server_of(request)
    fields = await read_body(request, DetokenizeRequest)
    model = server.models.get(fields.model, exchange_of(request.scope).caller.models)
    headers = ignored_headers(fields, server.settings.strict_params)
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise model.unavailable()
    check_ids(fields.tokens, model.vocabulary, "tokens")
    text = await off_loop(
        len(fields.tokens), lambda: tokenizer.decode(fields.tokens, skip_special_tokens=False)
    )
    response = json_response(Detokenized(text))
    response.headers.update(headers)
    return response
