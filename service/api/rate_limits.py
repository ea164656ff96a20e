"""A key's limits on the wire: each POST is counted once, its tokens are held and settled, and every
answer tells how the limits stand."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.anthropic_errors import speaks_anthropic
from service.api.errors import error_response
from service.api.exchange import Exchange, exchange_of, route_path
from service.api.submission import Job
from service.errors import RateLimited
from service.keys.limits import Limits, Standing, duration
from service.keys.metrics import KeyMetrics

NAMES = ("requests", "tokens", "concurrency", "tokens-day", "tokens-month")
LIMIT_HEADERS = [  # browsers may read
    *(f"X-RateLimit-{what}-{name}" for name in NAMES for what in ("Limit", "Remaining", "Reset")),
    *("Retry-After-Ms", "X-Should-Retry"),
]
ANTHROPIC_NAMES = ("requests", "tokens")


class RateLimits:
    """Inside of the keys, outside of the routes: refuses before a byte of the body is read."""

    def __init__(self, app: ASGIApp, limits: Limits, metrics: KeyMetrics) -> None:
        self.app = app
        self.limits = limits
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = exchange_of(scope) if scope["type"] == "http" else None
        limits = None if exchange is None else self.limits.of(exchange.caller.id)
        if exchange is None or limits is None:
            await self.app(scope, receive, send)
            return
        exchange.limits = limits

        async def told(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(dict(_headers(limits.standings())))
                if speaks_anthropic(route_path(scope)):
                    headers.update(dict(_anthropic_headers(limits.standings())))
            await send(message)

        if scope["method"] != "POST":
            await self.app(scope, receive, told)
            return
        try:
            limits.enter()
        except RateLimited as refused:
            self.metrics.note(exchange.caller.name, refused)
            await error_response(refused, scope)(scope, receive, told)
            return
        try:
            await self.app(scope, receive, told)
        finally:
            limits.leave(exchange.age)


def _headers(standings: Iterable[Standing]) -> Iterator[tuple[str, str]]:
    """As OpenAI names and writes them."""
    for one in standings:
        yield f"x-ratelimit-limit-{one.name}", str(one.limit)
        yield f"x-ratelimit-remaining-{one.name}", str(one.remaining)
        if one.reset is not None:
            yield f"x-ratelimit-reset-{one.name}", duration(one.reset)


def _anthropic_headers(standings: Iterable[Standing]) -> Iterator[tuple[str, str]]:
    """As Anthropic names them; resets are moments."""
    for one in standings:
        if one.name in ANTHROPIC_NAMES and one.reset is not None:
            reset = datetime.now(UTC) + timedelta(seconds=one.reset)
            start = f"anthropic-ratelimit-{one.name}"
            yield f"{start}-limit", str(one.limit)
            yield f"{start}-remaining", str(one.remaining)
            yield f"{start}-reset", reset.isoformat(timespec="seconds").replace("+00:00", "Z")


@contextmanager
def spending(exchange: Exchange, job: Job) -> Iterator[None]:
    """Hold what the job may need and settle it to what it used. Raises ``RateLimited``.

    A client that hangs up pays for its prompt whether its first token came or not, or prompts would
    be computed for nothing; what the server refuses or fails on costs what came of it.
    """
    if exchange.limits is None:
        yield
        return
    most = tokens_at_most(job)
    reservation = exchange.limits.reserve(most)
    tally, least = exchange.meter.tally, 0
    try:
        yield
    except asyncio.CancelledError:
        first_wave = job.prompts[: max(1, job.wave // job.n)]
        least = sum(len(prompt.ids) for prompt in first_wave)
        raise
    finally:
        prompt = job.num_prompt_tokens  # once, though it may have been computed again

        def settle() -> None:
            used = max(least, min(tally.num_prompt, prompt)) + tally.num_drawn
            reservation.settle(min(used, most))  # an answer begun anew is the server's to pay for

        tally.when_settled(settle)


def tokens_at_most(job: Job) -> int:
    budgets = sum(one.max_tokens for prompt in job.prompts for one in prompt.settings)
    return job.num_prompt_tokens + budgets
