"""Writes settings.md, wire.md and metrics.md from the code: ``python -m docs.generate``."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fastapi.routing import APIRoute
from pydantic import BaseModel

import service.errors
from docs import fields
from docs.metrics import metrics_page
from service.api.anthropic_errors import anthropic_envelope, anthropic_status
from service.api.app import ROUTED
from service.api.authentication import PUBLIC_PATHS
from service.api.errors import RequestTimeout
from service.api.schemas.adapters import LoadAdapterRequest, UnloadAdapterRequest
from service.api.schemas.chat import ChatRequest
from service.api.schemas.completions import CompletionRequest
from service.api.schemas.messages import ConversationFields, MessagesRequest
from service.api.schemas.pooling import EmbeddingRequest, RerankRequest, ScoreRequest
from service.api.schemas.responses import ResponseRequest
from service.api.schemas.sampling import SamplingFields
from service.api.schemas.tokens import DetokenizeRequest, TokenizeRequest
from service.engine.refusals import UNAVAILABLE
from service.errors import PronkError
from service.settings import ENVIRONMENT_PREFIX, Settings

FOLDER = Path(__file__).parent
NOTE = "<!-- Written by `python -m docs.generate`; change the code or docs/fields.py instead. -->"
COUNTED = "`/v1/messages` and `/v1/messages/count_tokens`"
UNNAMED_ERRORS = {"RateLimited"}  # what stands for its two kinds

SETTINGS_HEAD = f"""# Settings

{NOTE}

Every setting can be given as a flag of `pronk serve`, as an environment variable or as a key of a
TOML file (`--config FILE`; keys take `-` or `_`). Flags go before the environment, the environment
before the file, the file before the default. Unknown flags, `{ENVIRONMENT_PREFIX}*` variables and
keys are refused, so that a typo is never silent. Lists are JSON or separated by commas.

```toml
model = "/models/Llama-3.2-1B-Instruct"
max-model-len = 8192
log-format = "json"
```
"""

WIRE_HEAD = f"""# The wire

{NOTE}

What clients may send and what pronk does with it. The API is OpenAI's, with vLLM's extensions,
and Anthropic's for `/v1/messages`.
`null` means absent in every optional field. A field no table names is answered with 200 and named
in the header `X-Ignored-Params`, or refused with 400 under `strict: true` or `--strict-params`.

## Routes

`key`: whether it needs one where the server has keys (`/metrics`: not with `--metrics-public`),
as `Authorization: Bearer KEY` or `x-api-key: KEY`.

"""

SHARED_HEAD = """
## Fields of both completions and chat

`*`: or what the checkpoint's `generation_config.json` says. Log-probabilities are those of the
model's own logits, before bias, penalties and temperature.

"""

ANSWERS = """
## Answers

Completions and chat have OpenAI's shape; `stop_reason` (the stop string, the stop id or
`deadline`) stands beside `finish_reason` (`stop`, `length`, or `tool_calls` where a whole call was
read). Where the model thinks, `reasoning_content` stands beside `content`, and `reasoning_tokens`
of `usage.completion_tokens_details` counts its tokens, the closing mark included;
`usage.prompt_tokens_details.cached_tokens` counts what the prefix cache spared, and
`accepted_prediction_tokens` and `rejected_prediction_tokens` of `usage.completion_tokens_details`
what was guessed ahead and said, or in vain. A stream is
`data: {chunk}` events: each choice ends in exactly one with a `finish_reason`, `include_usage` adds
one with the usage and no choices, and `data: [DONE]` is the last. If the server fails after a
stream began, `data: {"error": {...}}` stands before `[DONE]` in their place. While
nothing comes, a stream carries a comment every `--ping-interval` seconds. `X-Request-Id` is echoed,
or made.

`/v1/responses` answers with a response of items (`reasoning`, `message`, `function_call`) and
streams `event:` lines with a `sequence_number` each, from `response.created` to
`response.completed` or `response.incomplete`; what fails ends in `error` and `response.failed`.
Nothing is stored: asking for an answer later is a 404. `/v1/messages` answers with content blocks
(`thinking`, `text`, `tool_use`) and streams Anthropic's events from `message_start` to
`message_stop`, with `ping` while nothing comes and `error` where it fails; a `thinking` block's
signature is empty. Neither ends in `[DONE]`. An answer that says nothing has one empty text.

Embeddings have length 1. A score is exp of the mean log-likelihood a token of the text that is
judged, each token given all before it: a number in (0, 1] that orders texts under this model. It is
no probability that a document is relevant.

An estimate has `prompt_tokens`, `cached_tokens`, `max_new_tokens`, `max_model_len`, `fits_context`,
`queue_seconds`, `prefill_seconds`, `decode_seconds` and `total_seconds`, `would_be_admitted`
and, if not, the `reason`. Seconds come from measured steps at the present load. Those of decoding
are for all of `max_new_tokens`; answers that run now are taken to become as long as answers were
lately.

## Errors

One envelope, the four keys always there:
`{"error": {"message": str, "type": str, "param": str or null, "code": str or null}}`.
Below `/v1/messages` it is Anthropic's,
`{"type": "error", "error": {"type": str, "message": str}, "request_id": str}`, with the type (and,
where it stands there, the status) of the last column.

"""


def settings_page() -> str:
    properties = Settings.model_json_schema()["properties"]
    parts = [SETTINGS_HEAD]
    for section, names in sections().items():
        parts.append(f"\n## {section}\n\n")
        parts.append(table(("flag", "variable", "TOML key", "value", "default", "meaning")))
        parts += [row(setting(name, properties[name])) for name in names]
    return "".join(parts)


def sections() -> dict[str, list[str]]:
    """The settings under the headings that their class has as comments, in its order."""
    found: dict[str, list[str]] = {}
    for line in inspect.getsource(Settings).splitlines():
        if heading := re.match(r"    # ---- (.+)", line):
            found[heading[1].capitalize()] = []
        elif (field := re.match(r"    (\w+): ", line)) and field[1] in Settings.model_fields:
            list(found.values())[-1].append(field[1])
    assert sum(map(len, found.values())) == len(Settings.model_fields), "a setting has no heading"
    return found


def setting(name: str, schema: Mapping[str, Any]) -> tuple[str, ...]:
    kebab = name.replace("_", "-")
    flag = "`MODEL` (no flag)" if name == "model" else f"`--{kebab}`"
    if schema.get("type") == "boolean" or "boolean" in str(schema.get("anyOf")):
        flag += f", `--no-{kebab}`"
    key = "" if name == "config" else f"`{name}`"
    variable = f"`{ENVIRONMENT_PREFIX}{name.upper()}`"
    return flag, variable, key, kind(schema, {}), default(schema), schema["description"]


def default(schema: Mapping[str, Any]) -> str:
    value = schema.get("default")
    if value in (None, "", []):
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def wire_page() -> str:
    shared = set(SamplingFields.model_fields)
    counted = set(ConversationFields.model_fields)
    parts = [WIRE_HEAD, table(("route", "key", "what it does")), *map(row, routes())]
    parts += [SHARED_HEAD, *field_table(SamplingFields, fields.SHARED)]
    for title, schema, notes, known in (
        ("`/v1/completions` alone", CompletionRequest, fields.COMPLETIONS, shared),
        ("`/v1/chat/completions` alone", ChatRequest, fields.CHAT, shared),
        ("`/v1/responses`", ResponseRequest, fields.RESPONSES, set()),
        (COUNTED, ConversationFields, fields.CONVERSATION, set()),
        ("`/v1/messages` alone", MessagesRequest, fields.MESSAGES, counted),
        ("`/v1/embeddings`", EmbeddingRequest, fields.EMBEDDINGS, set()),
        ("`/v1/score`", ScoreRequest, fields.SCORE, set()),
        ("`/v1/rerank`", RerankRequest, fields.RERANK, set()),
        ("`/tokenize`", TokenizeRequest, fields.TOKENIZE, set()),
        ("`/detokenize`", DetokenizeRequest, fields.DETOKENIZE, set()),
        ("`/v1/load_lora_adapter`", LoadAdapterRequest, fields.LOAD_ADAPTER, set()),
        ("`/v1/unload_lora_adapter`", UnloadAdapterRequest, fields.UNLOAD_ADAPTER, set()),
    ):
        parts += [f"\n## Fields of {title}\n\n", *field_table(schema, notes, known)]
    parts += [
        ANSWERS,
        table(("status", "type", "code", "when", "`/v1/messages`")),
        *map(row, errors()),
    ]
    return "".join(parts)


def routes() -> Iterator[tuple[str, str, str]]:
    """Each route, whether it needs a key where keys are set, and its handler's docstring."""
    for module in ROUTED:
        for route in module.router.routes:
            assert isinstance(route, APIRoute)
            path = route.path.replace(":path", "")
            said = inspect.getdoc(route.endpoint) or fields.ROUTES[path]
            guarded = "no" if path in PUBLIC_PATHS else "yes"
            yield f"`{min(route.methods or ())} {path}`", guarded, " ".join(said.split())


def field_table(
    schema: type[BaseModel], notes: Mapping[str, tuple[str, str]], known: set[str] | None = None
) -> list[str]:
    """One line a field that ``known`` does not have already."""
    whole = schema.model_json_schema()
    names = [name for name in whole["properties"] if name not in (known or ())]
    assert set(names) == set(notes), f"docs/fields.py: {set(names) ^ set(notes)}"
    lines = [table(("field", "type", "default", "meaning"))]
    for name in notes:
        typed = kind(whole["properties"][name], whole.get("$defs", {}))
        standard, meaning = notes[name]
        lines.append(row((f"`{name}`", typed, standard, meaning)))
    return lines


def kind(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    """A JSON schema in a few words: ``int 1..4096``, ``text or list of text``."""
    if "$ref" in schema:
        return kind(definitions[schema["$ref"].rsplit("/", 1)[1]], definitions)
    if members := schema.get("anyOf") or schema.get("oneOf"):
        options = [kind(one, definitions) for one in members if one.get("type") != "null"]
        return " or ".join(dict.fromkeys(options))
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if schema.get("type") == "array":
        items = kind(schema["items"], definitions)
        most = f", at most {schema['maxItems']}" if "maxItems" in schema else ""
        return f"list of {items}{most}"
    if schema.get("type") == "object" and isinstance(schema.get("additionalProperties"), dict):
        return f"object of {kind(schema['additionalProperties'], definitions)}"
    names = {"string": "text", "integer": "int", "number": "number", "boolean": "bool"}
    name = {"path": "path", "password": "secret"}.get(schema.get("format", ""), "")
    name = name or names.get(schema.get("type", ""), schema.get("type", "any"))
    return " ".join(filter(None, (name, bounds(schema))))


def bounds(schema: Mapping[str, Any]) -> str:
    low, high = schema.get("minimum"), schema.get("maximum")
    above, most = schema.get("exclusiveMinimum"), schema.get("maxLength")
    if low == -(1 << 63):
        return "of 64 bits"
    if most is not None:
        return f"of at most {most} characters"
    if low is not None and high is not None:
        return f"{low}..{high}"
    if above is not None:
        return f"> {above}" + (f", <= {high}" if high is not None else "")
    return f">= {low}" if low is not None else ""


def errors() -> Iterator[tuple[str, ...]]:
    """The tree of ``service/errors.py``, by status."""
    known = [value for _, value in inspect.getmembers(service.errors, inspect.isclass)]
    classes = {cls for cls in [*known, RequestTimeout] if issubclass(cls, PronkError)}
    classes = {cls for cls in classes if cls.__name__ not in UNNAMED_ERRORS}
    assert {cls.__name__ for cls in classes} == set(fields.ERRORS), "docs/fields.py: ERRORS"
    for cls in sorted(classes, key=lambda cls: (cls.status, cls.code or "", cls.__name__)):
        codes = [cls.code] if cls.code else []
        if cls.__name__ == "Unavailable":
            codes = list(dict.fromkeys(code for code, _ in UNAVAILABLE.values()))
        listed = ", ".join(f"`{code}`" for code in codes) or "null"
        when, error = fields.ERRORS[cls.__name__], cls("")
        status = anthropic_status(error)
        told = f"`{anthropic_envelope(error, '').error.type}`"
        theirs = told if status == cls.status else f"{status} {told}"
        yield str(cls.status), f"`{cls.type}`", listed, when, theirs


def table(names: tuple[str, ...]) -> str:
    return row(names) + "|" + "---|" * len(names) + "\n"


def row(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


PAGES = {"settings.md": settings_page, "wire.md": wire_page, "metrics.md": metrics_page}


def main() -> None:
    for name, page in PAGES.items():
        (FOLDER / name).write_text(page())


if __name__ == "__main__":
    main()
