"""The part of a request that completions and chat treat alike: from checked fields to a job."""

from __future__ import annotations

from collections.abc import Sequence

from service.api.constraints import Constraint, read_constraint
from service.api.exchange import Exchange
from service.api.ignored import ignored_headers, refuse_unsupported
from service.api.sampling import Sampling, check_limits, num_choices, speculation
from service.api.schemas.sampling import SamplingFields
from service.api.server import Server
from service.api.stream import AnswerResponse, Shape, StreamUsage
from service.api.submission import WAVE, Job, Prompt, TextOptions
from service.errors import InvalidRequest
from service.registry import Engine, ServedModel


def check(
    fields: SamplingFields, server: Server, exchange: Exchange, overruled: Sequence[str] = ()
) -> tuple[ServedModel, Engine, dict[str, str]]:
    """What can be refused without a tokenizer, cheapest first; the headers go with any answer.

    ``overruled`` fields are known, but another one leaves no room for them.
    """
    refuse_unsupported(fields)
    model = server.models.get(fields.model, exchange.caller.models)
    headers = ignored_headers(fields, server.settings.strict_params, overruled)
    check_limits(fields, server.settings)
    return model, model.pick(), headers


def make_sampling(
    fields: SamplingFields,
    server: Server,
    exchange: Exchange,
    model: ServedModel,
    *,
    logprobs: int | None,
    max_tokens: int | None,
    default_max_tokens: int | None,
    prompt_param: str,
    budget_param: str = "max_tokens",
    num_prompts: int = 1,
) -> Sampling:
    if logprobs is None and num_choices(fields) > (fields.n or 1):
        logprobs = 0  # what they are ranked by; the answer does not show it
    return Sampling(
        fields,
        model,
        logprobs=logprobs,
        max_tokens=max_tokens,
        default_max_tokens=default_max_tokens,
        prompt_param=prompt_param,
        budget_param=budget_param,
        seeds=server.seeds,
        speculation=speculation(fields, server.settings),
        num_prompts=num_prompts,
        max_request_tokens=server.settings.max_request_tokens,
        most_tokens=None if exchange.limits is None else exchange.limits.most_tokens(),
    )


def truncation(fields: SamplingFields, sampling: Sampling) -> int | None:
    """How many prompt tokens are kept; None is all."""
    length = fields.truncate_prompt_tokens
    return sampling.most_prompt_tokens() if length == -1 else length


def make_job(
    fields: SamplingFields,
    server: Server,
    exchange: Exchange,
    model: ServedModel,
    engine: Engine,
    prompts: Sequence[Prompt],
    *,
    echo_logprobs: int | None = None,
    constraint: Constraint | None = None,
    shown_special: frozenset[int] = frozenset(),
) -> Job:
    """``echo_logprobs``: alternatives for the prompt's own tokens, which stand in logprobs.

    ``constraint`` goes before what the fields say of the answer's text.
    """
    constraint = constraint or read_constraint(fields)
    if fields.use_beam_search and constraint is not None:
        raise InvalidRequest(
            "use_beam_search: cannot be used with structured output", param="use_beam_search"
        )
    wanted = [count for count in (fields.prompt_logprobs, echo_logprobs) if count is not None]
    _check_prompt_logprobs(prompts, max(wanted, default=None), server.settings.max_request_tokens)
    adapter = server.models.find(fields.model, exchange.caller.models)[1]
    skip_special = fields.skip_special_tokens is not False
    return Job(
        model=model,
        engine=engine,
        prompts=list(prompts),
        text=TextOptions(
            stop=tuple(fields.stop or ()),
            include_stop=bool(fields.include_stop_str_in_output),
            skip_special_tokens=skip_special,
            spaces_between_special_tokens=fields.spaces_between_special_tokens is not False,
            shown_special=shown_special,
            echo_logprobs=echo_logprobs is not None,
        ),
        namespace=server.namespace(exchange.caller.id, fields.cache_salt),
        account=exchange.caller.id,
        weight=exchange.caller.weight,
        priority=fields.priority or 0,
        deadline=_seconds(fields.deadline_ms),
        max_queue=_seconds(fields.max_queue_ms),
        prompt_logprobs=max(wanted, default=None),
        request_id=exchange.request_id,
        meter=exchange.meter,
        arrival=exchange.arrival,
        wave=min(WAVE, server.settings.max_queued_requests),
        log_content=server.settings.log_content,
        adapter=adapter,
        adapter_version=0 if adapter is None else adapter.version(engine),
        grammar="" if constraint is None else constraint.grammar,
        grammar_param=None if constraint is None else constraint.param,
        shown=(fields.n or 1) if num_choices(fields) > (fields.n or 1) else None,
        length_penalty=_length_penalty(fields),
    )


def _check_prompt_logprobs(prompts: Sequence[Prompt], alternatives: int | None, most: int) -> None:
    """Raises ``InvalidRequest`` for more of them than one answer may hold."""
    num_shown = sum(len(prompt.ids) * len(prompt.settings) for prompt in prompts)
    if alternatives is None or num_shown == len(prompts[0].ids):
        return
    asked = num_shown * (1 + alternatives)
    if asked > most:
        raise InvalidRequest(
            f"prompt: the log-probabilities of all its tokens are {asked} numbers, and this server "
            f"gives {most} in one answer. Send fewer prompts at a time.",
            param="prompt",
        )


def _length_penalty(fields: SamplingFields) -> float | None:
    if not fields.use_beam_search:
        return None
    return 1.0 if fields.length_penalty is None else fields.length_penalty


def _seconds(milliseconds: int | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000


def respond(
    fields: SamplingFields,
    server: Server,
    exchange: Exchange,
    job: Job,
    shape: Shape,
    headers: dict[str, str],
) -> AnswerResponse:
    options = fields.stream_options
    include_usage = bool(options and options.include_usage)
    always = bool(options and options.continuous_usage_stats) and include_usage
    return AnswerResponse(
        job,
        shape,
        metrics=server.metrics,
        exchange=exchange,
        stream=StreamUsage(include_usage, always) if fields.stream else None,
        ping_interval=server.settings.ping_interval,
        headers=headers,
    )
