"""What spans say, in the words of OpenTelemetry's semantic conventions (HTTP and generative AI).

Counts, times, names and settings; never a prompt, an answer, a stop string, or who called from
where.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from starlette.types import Scope

from service.api.exchange import Exchange, Outcome

if TYPE_CHECKING:
    from service.ledger.record import Record

Value = str | bool | int | float | list[str]

LONGEST_PATH = 256  # characters: strangers choose it
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
OPERATIONS = {
    "/v1/completions": "text_completion",
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/messages": "chat",
    "/v1/embeddings": "embeddings",
    "/v1/score": "score",
    "/v1/rerank": "rerank",
}
PROVIDER = "pronk"


def opening(exchange: Exchange, scope: Scope, path: str) -> Mapping[str, Value]:
    """What is known at the first byte; samplers see it."""
    found: dict[str, Value] = {
        "http.request.method": scope["method"] if scope["method"] in METHODS else "_OTHER",
        "url.scheme": scope.get("scheme", "http"),
        "url.path": path[:LONGEST_PATH],
        "network.protocol.version": scope.get("http_version", "1.1"),
        "pronk.request.id": exchange.request_id,
    }
    match scope.get("server"):
        case (str() as address, int() as port):
            found |= {"server.address": address, "server.port": port}
        case (str() as address, None):  # a Unix socket
            found["server.address"] = address
    return found


def ending(exchange: Exchange, record: Record, outcome: Outcome) -> Mapping[str, Value]:
    found: dict[str, Value] = {"pronk.outcome": outcome}
    if record.route != "unmatched":
        found["http.route"] = record.route
    if record.status is not None:
        found["http.response.status_code"] = record.status
    if outcome == "failed" or (record.status or 0) >= 500:
        found["error.type"] = record.code or str(record.status or "disconnected")
    elif outcome == "rejected" and record.code:
        found["pronk.error.code"] = record.code
    if record.key_name:
        found["pronk.key.name"] = record.key_name
    if exchange.is_generation:
        found |= _asked(exchange, record)
        found |= _answered(exchange, record)
    return found


def _asked(exchange: Exchange, record: Record) -> dict[str, Value]:
    meter = exchange.meter
    found: dict[str, Value] = {
        "gen_ai.provider.name": PROVIDER,
        "gen_ai.system": PROVIDER,  # its older name
    }
    if operation := OPERATIONS.get(record.route):
        found["gen_ai.operation.name"] = operation
    if model := record.adapter or record.model:
        found["gen_ai.request.model"] = found["gen_ai.response.model"] = model
    if meter.num_choices:
        found["gen_ai.request.choice.count"] = meter.num_choices
        found["gen_ai.request.stream"] = meter.is_stream
    if (sampling := meter.sampling) is not None and record.route in OPERATIONS:
        found |= {
            "gen_ai.request.max_tokens": sampling.max_tokens,
            "gen_ai.request.temperature": sampling.temperature,
            "gen_ai.request.top_p": sampling.top_p,
            "gen_ai.request.top_k": sampling.top_k,
            "gen_ai.request.frequency_penalty": sampling.frequency_penalty,
            "gen_ai.request.presence_penalty": sampling.presence_penalty,
        }
    return found


def _answered(exchange: Exchange, record: Record) -> dict[str, Value]:
    meter = exchange.meter
    found: dict[str, Value] = {}
    if meter.response_id:
        found["gen_ai.response.id"] = meter.response_id
    if meter.endings:
        found["gen_ai.response.finish_reasons"] = [
            meter.endings[index] for index in sorted(meter.endings)
        ]
    if meter.tally.num_prompt or meter.tally.num_drawn:
        found |= {
            "gen_ai.usage.input_tokens": record.prompt_tokens,
            "gen_ai.usage.cache_read.input_tokens": record.cached_tokens,
            "gen_ai.usage.output_tokens": record.generated_tokens,
            "pronk.usage.discarded_tokens": record.discarded_tokens,
        }
    if record.reasoning_tokens is not None:
        found["gen_ai.usage.reasoning.output_tokens"] = record.reasoning_tokens
    for name, seconds in (
        ("queue", record.queue_seconds),
        ("prefill", record.prefill_seconds),
        ("decode", record.decode_seconds),
    ):
        if seconds is not None:
            found[f"pronk.{name}.seconds"] = seconds
    if meter.tally.first_output is not None:
        first = meter.tally.first_output[0] - exchange.arrival
        found["gen_ai.response.time_to_first_chunk"] = first
    return found
