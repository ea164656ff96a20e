"""From a chat request to a job: budget, template, tokens, and how the answer will be read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from service.api.dialects import dialect_of, marks_of, shown_ids
from service.api.exchange import Exchange
from service.api.jobs import check, make_job, make_sampling, truncation
from service.api.prompts import encode_chat, template_for, truncate
from service.api.readers.thinking import Marks, ThinkingReader
from service.api.reading import AnswerReader
from service.api.schemas.chat import ChatRequest
from service.api.server import Server
from service.api.submission import Job, Prompt
from service.api.tools import ToolPlan, read_plan
from service.errors import InvalidRequest
from service.redaction import Redacted
from service.registry import ServedModel

if TYPE_CHECKING:
    from model.tokenizer import Tokenizer

TAIL = 32  # tokens; more than an opening mark and the blanks after it take


@dataclass(frozen=True, slots=True, repr=False)
class Chat(Redacted):
    """A conversation ready for the engine, and how the text of each choice is read."""

    job: Job
    headers: dict[str, str]  # go with any answer
    reader: Callable[[], AnswerReader]  # a new one for each choice
    calls_alone: bool = False  # content is null


async def prepare(fields: ChatRequest, server: Server, exchange: Exchange) -> Chat:
    """Also for routes that speak of conversations in other words: they make a ``ChatRequest``."""
    budget, max_tokens = read_max_tokens(fields)
    logprobs = read_logprobs(fields)
    plan = read_plan(fields)
    model, engine, headers = check(fields, server, exchange, plan.overruled(fields))
    fields = plan.in_force(fields)
    sampling = make_sampling(
        fields,
        server,
        exchange,
        model,
        logprobs=logprobs,
        max_tokens=max_tokens,
        default_max_tokens=None,
        prompt_param="messages",
        budget_param=budget,
    )
    ids = await read_conversation(fields, server, model, plan)
    kept = truncate(ids, truncation(fields, sampling), fields.truncation_side)
    prompt = Prompt(kept, sampling.for_prompt(len(kept)), _echo(fields))
    template = template_for(
        fields, model, allowed=server.settings.allow_request_chat_template
    ).source
    tokenizer = model.tokenizer
    assert tokenizer is not None
    dialect = dialect_of(template, tokenizer, server.settings.tool_call_parser)
    marks = marks_of(template, tokenizer, server.settings.reasoning_parser)
    shown = (
        *(dialect.markers if plan.is_auto else ()),
        *((marks.open, marks.close) if marks else ()),
    )
    job = make_job(
        fields,
        server,
        exchange,
        model,
        engine,
        [prompt],
        constraint=plan.constraint(),
        shown_special=shown_ids(shown, tokenizer),
    )
    if marks is None or job.grammar:  # a grammar leaves no room for thoughts
        return Chat(job, headers, lambda: plan.reader(dialect), plan.is_constrained)
    is_open = begins_in_thought(fields, prompt, tokenizer, marks)
    return Chat(job, headers, lambda: ThinkingReader(marks, plan.reader(dialect), is_open=is_open))


def read_max_tokens(fields: ChatRequest) -> tuple[str, int | None]:
    """The field that counts and its value: the newer name wins over ``max_tokens``."""
    name = "max_tokens" if fields.max_completion_tokens is None else "max_completion_tokens"
    value: int | None = getattr(fields, name)
    if value == 0:
        raise InvalidRequest(f"{name}: must be at least 1", param=name)
    return name, value


def read_logprobs(fields: ChatRequest) -> int | None:
    """How many alternatives each token gets; None is no logprobs at all."""
    if fields.logprobs:
        return fields.top_logprobs or 0
    if fields.top_logprobs:
        raise InvalidRequest("top_logprobs: needs logprobs: true", param="top_logprobs")
    return None


async def read_conversation(
    fields: ChatRequest, server: Server, model: ServedModel, plan: ToolPlan
) -> list[int]:
    effort = fields.reasoning_effort
    return await encode_chat(
        fields.messages,
        fields,
        model,
        allow_template=server.settings.allow_request_chat_template,
        add_special_tokens=bool(fields.add_special_tokens),
        extra={} if effort is None else {"reasoning_effort": effort},
        tools=plan.tools,
        tool_call_parser=server.settings.tool_call_parser,
    )


def begins_in_thought(
    fields: ChatRequest, prompt: Prompt, tokenizer: Tokenizer, marks: Marks
) -> bool:
    """Whether the prompt has opened the reasoning the answer goes on with: templates do, and a
    message that is continued may have."""
    if prompt.echo:
        return False
    if fields.continue_final_message:
        said = fields.messages[-1].text() or ""
        return said.rfind(marks.open) > said.rfind(marks.close)
    tail = tokenizer.decode(prompt.ids[-TAIL:], skip_special_tokens=False)
    return tail.rstrip().endswith(marks.open)


def _echo(fields: ChatRequest) -> str:
    """As vLLM: an answer that continues the assistant's own last message may repeat it first."""
    last = fields.messages[-1]
    return (last.text() or "") if fields.echo and last.role == "assistant" else ""
