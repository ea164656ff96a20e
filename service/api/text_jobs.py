"""Jobs that ask of texts and generate none: what embeddings, scores and rankings treat alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from msgspec import Struct, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from service.api.exchange import Exchange
from service.api.ignored import ignored_headers
from service.api.meter import Meter
from service.api.prompts import encode
from service.api.sampling import check_ids
from service.api.schemas.answers import Usage
from service.api.schemas.pooling import TextFields, TextUsage
from service.api.server import Server, server_of
from service.api.stream import AnswerResponse
from service.api.submission import WAVE, Job, Prompt
from service.api.text import Event
from service.engine.messages import SamplingSettings
from service.errors import ContextLengthExceeded, InvalidRequest
from service.registry import Engine, ServedModel

NOTHING_DRAWN = SamplingSettings(max_tokens=0)


class TextQuestion:
    """One such request: its model and engine, how its texts become prompts, how it is answered."""

    def __init__(self, request: Request, exchange: Exchange, fields: TextFields) -> None:
        self.server: Server = server_of(request)
        self.fields = fields
        self.model: ServedModel = self.server.models.get(fields.model, exchange.caller.models)
        self.headers = ignored_headers(fields, self.server.settings.strict_params)
        self.engine: Engine = self.model.pick()
        if fields.truncate_prompt_tokens == 0:
            raise InvalidRequest(
                "truncate_prompt_tokens: must be at least 1, or -1 for what fits",
                param="truncate_prompt_tokens",
            )
        self._exchange = exchange

    @property
    def name(self) -> str:
        return self.fields.model or self.model.name

    def check_count(self, count: int, param: str) -> None:
        most = self.server.settings.max_prompts
        if count > most:
            raise InvalidRequest(f"{param}: takes at most {most} texts on this server", param=param)

    def encode(self, text: str | list[int], param: str, *, begins: bool = True) -> list[int]:
        """Ids are taken as they are; ``begins``: the begin token may stand before it."""
        if not isinstance(text, str):
            check_ids(text, self.model.vocabulary, param)
            return list(text)
        assert self.model.tokenizer is not None
        special = begins and self.fields.add_special_tokens is not False
        parse = self.fields.parse_special_tokens is not False
        return encode(text, self.model.tokenizer, special=special, parse=parse)

    def truncated(self, ids: list[int], others: int, param: str) -> list[int]:
        """Cut to what was asked for, ``others`` being tokens that stay beside them. The end goes
        first: these are texts to be judged, not to be continued."""
        wanted = self.fields.truncate_prompt_tokens
        longest = self.model.context
        if wanted is not None:
            room = (longest if wanted == -1 else wanted) - others
            if room < 1:
                raise InvalidRequest(
                    f"truncate_prompt_tokens: {wanted} leaves no room beside the {others} tokens "
                    "that are not cut",
                    param="truncate_prompt_tokens",
                )
            if len(ids) > room:
                ids = ids[-room:] if self.fields.truncation_side == "left" else ids[:room]
        if len(ids) + others > longest:
            raise ContextLengthExceeded(
                f"The model's context is {longest} tokens and {param} has {len(ids) + others}; "
                "send a shorter text, or truncate_prompt_tokens: -1.",
                param=param,
            )
        return ids

    def answer(
        self,
        prompts: Sequence[Prompt],
        write: Callable[[list[Event], TextUsage], Struct],
        *,
        pooling: str = "",
        prompt_logprobs: int | None = None,
    ) -> Response:
        """Through the engine by waves, as completions go; a client that hangs up ends it."""
        exchange, settings = self._exchange, self.server.settings
        adapter = self.server.models.find(self.fields.model, exchange.caller.models)[1]
        job = Job(
            model=self.model,
            engine=self.engine,
            prompts=list(prompts),
            namespace=self.server.namespace(exchange.caller.id, self.fields.cache_salt),
            account=exchange.caller.id,
            weight=exchange.caller.weight,
            priority=self.fields.priority or 0,
            prompt_logprobs=prompt_logprobs,
            pooling=pooling,
            request_id=exchange.request_id,
            meter=exchange.meter,
            arrival=exchange.arrival,
            wave=min(WAVE, settings.max_queued_requests),
            log_content=settings.log_content,
            adapter=adapter,
            adapter_version=0 if adapter is None else adapter.version(self.engine),
        )
        return AnswerResponse(
            job,
            WholeAnswer(write),
            metrics=self.server.metrics,
            exchange=exchange,
            stream=None,
            ping_interval=settings.ping_interval,
            headers=self.headers,
        )


class WholeAnswer:
    """A shape without chunks: nothing of it is known before all of it is."""

    def __init__(self, write: Callable[[list[Event], TextUsage], Struct]) -> None:
        self._write = write

    def whole(self, events: list[Event], usage: Usage) -> Struct:
        return self._write(events, TextUsage(usage.prompt_tokens, usage.prompt_tokens))

    def account(self, meter: Meter) -> None:
        """Nothing: no text is generated."""

    def chunks(self, event: Event, usage: Usage | UnsetType | None) -> list[Struct]:
        raise AssertionError("never streamed")

    def last_chunks(self, usage: Usage) -> list[Struct]:
        raise AssertionError("never streamed")
