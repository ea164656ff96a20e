"""The books balance: what the ledger says is what the engines counted, whatever happened."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM

from service.engine.client import EngineClient
from service.engine.messages import Outputs, State
from service.ledger.ledger import Ledger
from service.ledger.record import Record
from service.ledger.report import Range, records, summarize
from service.ledger.store import Store
from tests.api.conftest import Reader, scope_of, until
from tests.api.tiny import Tiny, tiny_checkpoint, tiny_server

KILLED_AFTER = 150  # tokens: while most are still on their way
LETTERS = "abcdefghijklmnopqrstuvwxyz"
TOLD = ("prompt_tokens", "cached_tokens", "generated_tokens")


@pytest.fixture(scope="module")
def checkpoint() -> Iterator[tuple[Path, LlamaForCausalLM]]:
    with tiny_checkpoint() as found:
        yield found


@dataclass
class Life:
    """Of one engine process: what it sent, and what it last said that it had sent."""

    generated: int = 0
    prompt: int = 0
    told: State | None = None


@dataclass
class Books:
    """An observer: every message of every engine, by its life."""

    engine: EngineClient
    lives: dict[int, Life] = field(default_factory=dict)

    @property
    def life(self) -> Life:
        return self.lives.setdefault(self.engine.num_restarts, Life())

    def hear(self, message: Outputs | State) -> None:
        life = self.life
        if isinstance(message, Outputs):
            life.generated += sum(len(output.tokens) for output in message.outputs)
            life.prompt += sum(output.prompt_tokens or 0 for output in message.outputs)
        elif message.counters:
            life.told = message
            # It came after all that it counts: nothing is lost between engine and observer.
            assert message.counters["generation_tokens"] <= life.generated
            assert message.counters["prompt_tokens"] <= life.prompt

    def are_closed(self) -> bool:
        """The engine that lives has told of everything it sent."""
        life = self.life
        told = life.told.counters if life.told is not None else {}
        return (told.get("generation_tokens"), told.get("prompt_tokens")) == (
            life.generated,
            life.prompt,
        )


@dataclass
class Request:
    path: str
    body: dict[str, Any]
    hangs_up: float | None = None  # seconds after it was sent
    name: str = ""
    status: int | None = None
    answer: str = ""

    async def send(self, tiny: Tiny) -> None:
        reader = Reader(self.body)
        reader.may_read.set()
        scope = scope_of(self.path)
        scope["headers"] = [*scope["headers"], (b"x-request-id", self.name.encode())]
        call = asyncio.ensure_future(tiny.app(scope, reader.receive, reader.send))
        if self.hangs_up is not None:
            await asyncio.wait([call], timeout=self.hangs_up)
            reader.gone.set()
        await call
        self.status = next((m["status"] for m in reader.messages if "status" in m), None)
        self.answer = reader.text

    @property
    def usage(self) -> dict[str, Any] | None:
        """As the client was told, if it was."""
        if self.status != 200:
            return None
        if not self.body.get("stream"):
            told: dict[str, Any] | None = json.loads(self.answer).get("usage")
            return told
        lines = [line[6:] for line in self.answer.split("\n") if line.startswith("data: {")]
        return next((found for line in lines if (found := json.loads(line).get("usage"))), None)


def draw_request(dice: random.Random) -> Request:
    kind = dice.choice(["plain", "plain", "chatty", "stops", "late", "many", "beams", "odd"])
    letters = "".join(dice.choices(LETTERS, k=dice.randint(1, 90)))
    body: dict[str, Any] = {
        "prompt": letters,
        "max_tokens": dice.randint(1, 30),
        "seed": dice.randrange(1000),
        "ignore_eos": dice.random() < 0.7,
        "logit_bias": {"198": -100},
        "stream": dice.random() < 0.5,
    }
    match kind:
        case "chatty":
            body["n"] = dice.randint(2, 4)
        case "stops":  # often the last of a text's tokens come after it
            body |= {"stop": dice.sample(LETTERS, 4), "max_tokens": 60, "n": dice.randint(1, 2)}
        case "late":
            body[dice.choice(["deadline_ms", "max_queue_ms"])] = dice.randint(1, 60)
        case "many":  # in waves of two
            body["prompt"] = [letters, letters[::-1], letters[:3] + "!", "Once"]
            body["n"] = dice.randint(1, 2)
        case "beams":
            body |= {"use_beam_search": True, "n": 2, "max_tokens": 6, "stream": False}
            del body["seed"], body["logit_bias"]
        case "odd":
            return dice.choice(
                [
                    Request("/v1/completions", body | {"max_tokens": -1}),
                    Request("/v1/completions", body | {"model": "another"}),
                    Request("/v1/completions", body | {"prompt": "a" * 600}),
                    Request("/v1/estimate", {"prompt": letters}),
                    Request("/v1/score", {"text_1": letters, "text_2": ["a", "of two"]}),
                ]
            )
    if body["stream"] and dice.random() < 0.7:
        body["stream_options"] = {"include_usage": True}
    hangs_up = dice.uniform(0, 0.4) if dice.random() < 0.35 else None
    return Request("/v1/completions", body, hangs_up)


async def storm(
    tiny: Tiny, books: Books, dice: random.Random, num_requests: int, kills: int
) -> list[Request]:
    """Some are waiting, some are running, some have just been left when an engine is killed."""
    sent: list[Request] = []
    for round_ in range(kills + 1):
        await until(lambda: tiny.engine.num_restarts == round_, within=60)  # noqa: B023
        await tiny.engine.wait_ready()
        fresh = [draw_request(dice) for _ in range(num_requests // (kills + 1))]
        for number, request in enumerate(fresh):
            request.name = f"r-{round_}-{number}"
        sent += fresh
        tasks = [asyncio.create_task(request.send(tiny)) for request in fresh]
        if round_ < kills:
            await until(lambda: books.life.generated >= KILLED_AFTER, within=60)
            assert tiny.engine.pid is not None
            os.kill(tiny.engine.pid, signal.SIGKILL)
        await asyncio.gather(*tasks)
    return sent


async def balance(
    checkpoint: tuple[Path, LlamaForCausalLM], file: Path, num_requests: int, kills: int
) -> Counter[str]:
    """Every sum by hand; the finishes that were seen."""
    ledger = Ledger(Store(file), interval=0.05)
    settings = {"max_queued_requests": 2}
    async with tiny_server(*checkpoint, settings=settings, ledger=ledger) as tiny:
        books = Books(tiny.engine)
        tiny.engine.observers.append(books.hear)
        sent = await storm(tiny, books, random.Random(11), num_requests, kills)
        await until(books.are_closed, within=60)
        metrics = (await tiny.http.get("/metrics")).text
    ledger.close()
    written = list(records(file, Range()))
    assert len(books.lives) == kills + 1

    assert sorted(record.request_id for record in written) == sorted(one.name for one in sent)
    lives = books.lives.values()
    assert sum(r.engine_generated_tokens for r in written) == sum(life.generated for life in lives)
    assert sum(r.engine_prompt_tokens for r in written) == sum(life.prompt for life in lives)
    by_name = {record.request_id: record for record in written}
    for request in sent:
        check_record(request, by_name[request.name])
    check_sums(file, written, metrics)
    return Counter(word for record in written for word in record.finish.split("+"))


def check_record(request: Request, record: Record) -> None:
    assert record.status == request.status
    if "use_beam_search" not in request.body:
        told = record.generated_tokens + record.discarded_tokens
        assert told == record.engine_generated_tokens, request
        # A second engine computes the prompt again: what the first one had said was not read.
        is_retried = record.engine_prompt_tokens > record.prompt_tokens and record.discarded_tokens
        assert is_retried or record.prompt_tokens == record.engine_prompt_tokens
    if record.finish == "error" or record.finish == "cancelled":
        return
    if (usage := request.usage) is None:
        assert (
            record.finish == "rejected"
            or request.path == "/v1/estimate"
            or (request.body.get("stream") and "stream_options" not in request.body)
        )
        return
    assert record.generated_tokens == usage.get("completion_tokens", 0)
    if "deadline" not in record.finish:  # it may have ended before its prompt was computed
        assert record.prompt_tokens == usage["prompt_tokens"]


def check_sums(file: Path, written: list[Record], metrics: str) -> None:
    total = summarize(file, "key", Range())
    told = dict(zip(total.columns[2:], total.total, strict=True))
    for name in (*TOLD, "discarded_tokens", "engine_generated_tokens"):
        assert told[name] == sum(getattr(record, name) for record in written)
    assert told["requests"] == len(written)
    counted = {
        line.split(" ")[0]: float(line.split(" ")[1])
        for line in metrics.splitlines()
        if line.startswith("pronk:key_")
    }
    sums = {
        "generation": sum(record.generated_tokens for record in written),
        "discarded": sum(record.discarded_tokens for record in written),
        "prompt": sum(record.prompt_tokens for record in written),
    }
    for name, value in sums.items():
        assert counted[f'pronk:key_{name}_tokens_total{{key="none"}}'] == value
    requests = [value for name, value in counted.items() if "key_requests_total" in name]
    assert sum(requests) == len(written)


async def test_books_balance_over_a_storm_with_kills(
    checkpoint: tuple[Path, LlamaForCausalLM], tmp_path: Path
) -> None:
    finishes = await balance(checkpoint, tmp_path / "usage.db", num_requests=120, kills=2)
    wanted = {"stop", "length", "deadline", "cancelled", "error", "rejected"}
    assert wanted <= finishes.keys(), "the storm had all kinds of ends"


@pytest.mark.slow
async def test_books_balance_over_a_long_storm(
    checkpoint: tuple[Path, LlamaForCausalLM], tmp_path: Path
) -> None:
    await balance(checkpoint, tmp_path / "usage.db", num_requests=2_000, kills=4)
