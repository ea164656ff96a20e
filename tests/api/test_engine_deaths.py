"""The engine dies, raises or has no memory under requests of every kind: what their clients see.

A real engine process with a tiny network; answers are compared with those of an undisturbed one.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from transformers import LlamaForCausalLM

from service.engine.attempt import Attempt
from service.engine.supervisor import Patience
from tests.api.tiny import Tiny, tiny_checkpoint, tiny_server
from tests.engine.checkpoints import NAN_TOKEN
from tests.engine.test_client import until
from tests.engine.treacherous_worker import FILLS, FILLS_ALONE, KILLS, RAISES

pytestmark = pytest.mark.asyncio(loop_scope="module")
PROMPT = [(7 * i) % 150 + 3 for i in range(40)]
DRAWN = {"max_tokens": 12, "seed": 5, "logit_bias": {str(NAN_TOKEN): -100}}
STREAMED = {"stream": True, "stream_options": {"include_usage": True}}
EVERY_KIND: dict[str, tuple[str, dict[str, Any]]] = {
    "whole": ("/v1/completions", {"prompt": PROMPT, "n": 3} | DRAWN),
    "stream": ("/v1/completions", {"prompt": PROMPT[1:]} | DRAWN | STREAMED),
    "waves": ("/v1/completions", {"prompt": [PROMPT[i:] for i in range(20)]} | DRAWN),
    "beams": ("/v1/completions", {"prompt": PROMPT, "n": 2, "use_beam_search": True}),
    "embedding": ("/v1/embeddings", {"input": [PROMPT, PROMPT[3:]]}),
    "score": ("/v1/score", {"text_1": "some words", "text_2": ["and more", "or less"]}),
}
CHANGING = ("id", "created", "system_fingerprint")


@pytest.fixture(scope="module")
def checkpoint() -> Iterator[tuple[Path, LlamaForCausalLM]]:
    with tiny_checkpoint() as made:
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def tiny(checkpoint: tuple[Path, LlamaForCausalLM]) -> AsyncIterator[Tiny]:
    async with tiny_server(
        *checkpoint,
        settings={"ping_interval": 0.1},
        patience=Patience(restart_delay=0.05, max_restart_delay=0.1, max_restarts=10),
        worker="tests.engine.treacherous_worker",
        enable_prefix_caching=False,  # or usage would tell which answer came second
        log_level="critical",
    ) as made:
        yield made


def lasting(value: Any) -> Any:
    """An answer without what differs from one to the next."""
    if isinstance(value, dict):
        return {key: lasting(own) for key, own in value.items() if key not in CHANGING}
    return [lasting(one) for one in value] if isinstance(value, list) else value


def streamed(text: str) -> list[Any]:
    """Events of a stream, which ends once and as it should."""
    lines = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    assert lines.count("[DONE]") == 1
    return [json.loads(line) for line in lines[:-1]]


def said(answer: httpx.Response) -> Any:
    """What a client made of it, however it was cut into events."""
    assert answer.status_code == 200, answer.text
    if not answer.headers["content-type"].startswith("text/event-stream"):
        return lasting(answer.json())
    events = streamed(answer.text)
    text = "".join(choice["text"] for event in events for choice in event["choices"])
    return text, events[-1]["usage"]


async def ask_all(tiny: Tiny) -> dict[str, httpx.Response]:
    posts = [tiny.http.post(path, json=body) for path, body in EVERY_KIND.values()]
    answers = await asyncio.gather(*posts)
    return dict(zip(EVERY_KIND, answers, strict=True))


def completion(tiny: Tiny, first: int, number: int = 0, **fields: Any) -> Any:
    body = {"prompt": [first, number, *PROMPT], "max_tokens": 10, "temperature": 0.0} | fields
    return tiny.http.post("/v1/completions", json=body)


async def innocent(tiny: Tiny) -> list[Any]:
    """Some requests, among them a streamed one and one that draws several choices."""
    asked = [completion(tiny, 9, i) for i in range(4)]
    asked.append(completion(tiny, 9, 4, **STREAMED))
    drawn = {"temperature": 1.0, "presence_penalty": 0.5, "n": 3}
    asked.append(completion(tiny, 9, 5, **DRAWN | drawn))
    return [said(answer) for answer in await asyncio.gather(*asked)]


async def test_requests_of_every_kind_survive_an_engine_that_is_killed(tiny: Tiny) -> None:
    before = await ask_all(tiny)
    engine, in_hand = tiny.engine, 1 + 1 + 20 + 1 + 2 + 2
    assert engine.pid is not None
    os.kill(engine.pid, signal.SIGSTOP)  # so that all of them are in its hands, and none is begun
    asking = asyncio.create_task(ask_all(tiny))
    await until(lambda: engine.num_unfinished == in_hand)
    os.kill(engine.pid, signal.SIGKILL)
    after = await asking
    assert {kind: said(answer) for kind, answer in after.items()} == {
        kind: said(answer) for kind, answer in before.items()
    }
    assert ": ping" in after["stream"].text, "the silence was filled"
    assert engine.num_restarts == 1
    assert engine.num_retried == in_hand
    assert engine.num_unfinished == 0
    metrics = (await tiny.http.get("/metrics")).text
    labels = 'engine="0",model_name="tiny"'
    assert f'pronk:engine_restarts_total{{{labels},reason="killed"}} 1.0' in metrics
    assert f'pronk:engine_restarts_total{{{labels},reason="stalled"}} 0.0' in metrics


async def test_a_whole_answer_that_had_begun_is_made_anew_and_a_stream_is_told(tiny: Tiny) -> None:
    """No byte of a whole answer has left before all of it has."""
    long = {"max_tokens": 440, "n": 2}
    before = said(await completion(tiny, 8, **long))
    engine, num_restarts = tiny.engine, tiny.engine.num_restarts
    asking = asyncio.create_task(completion(tiny, 8, **long))
    streaming = asyncio.create_task(completion(tiny, 8, 1, stream=True, **long))
    await until(lambda: sum(one.generation.num_tokens > 20 for one in attempts(tiny)) == 2)
    assert all(one.generation.has_given for one in attempts(tiny))
    assert engine.pid is not None
    os.kill(engine.pid, signal.SIGKILL)
    assert said(await asking) == before
    *_, last = streamed((await streaming).text)
    assert last["error"]["code"] == "engine_failure"
    assert engine.num_restarts == num_restarts + 1
    metrics = (await tiny.http.get("/metrics")).text.splitlines()
    ends = [line for line in metrics if line.startswith("vllm:request_success_total")]
    (errors,) = [line for line in ends if 'finished_reason="error"' in line]
    assert errors.endswith(" 2.0"), "those of the stream alone"


def attempts(tiny: Tiny) -> list[Attempt]:
    return list(tiny.engine._attempts.values())


async def test_poison_is_refused_and_its_company_is_answered(tiny: Tiny) -> None:
    undisturbed = await innocent(tiny)
    before = tiny.engine.num_restarts
    poisons = [completion(tiny, KILLS), completion(tiny, KILLS, 1, **STREAMED)]
    *poisoned, others = await asyncio.gather(*poisons, innocent(tiny))
    assert others == undisturbed
    whole, stream = poisoned
    assert (whole.status_code, whole.json()["error"]["code"]) == (400, "poison_request")
    if stream.status_code == 200:  # a ping had gone out
        (event,) = streamed(stream.text)
        assert event["error"]["code"] == "poison_request"
    else:
        assert stream.json()["error"]["code"] == "poison_request"
    await tiny.engine.wait_ready()
    num_restarts = tiny.engine.num_restarts
    again = await completion(tiny, KILLS)
    assert again.json()["error"]["code"] == "poison_request"
    assert "retry-after" not in again.headers
    assert tiny.engine.num_restarts == num_restarts
    assert num_restarts - before <= 4, "two deaths for each of the two"
    assert "pronk:poisonous_requests_total" in (await tiny.http.get("/metrics")).text


async def test_a_row_that_makes_a_step_raise_fails_alone(tiny: Tiny) -> None:
    undisturbed, pid = await innocent(tiny), tiny.engine.pid
    bad, others = await asyncio.gather(completion(tiny, RAISES), innocent(tiny))
    assert others == undisturbed
    assert (bad.status_code, bad.json()["error"]["code"]) == (500, "engine_failure")
    assert "kernel" not in bad.text
    assert tiny.engine.pid == pid


async def test_a_device_without_memory_makes_steps_smaller(tiny: Tiny) -> None:
    undisturbed, pid = await innocent(tiny), tiny.engine.pid
    alone = said(await completion(tiny, FILLS))
    large, others = await asyncio.gather(completion(tiny, FILLS), innocent(tiny))
    assert others == undisturbed
    assert said(large) == alone
    assert tiny.engine.pid == pid


async def test_who_has_no_room_even_alone_is_told_so(tiny: Tiny) -> None:
    undisturbed, pid = await innocent(tiny), tiny.engine.pid
    bad, others = await asyncio.gather(completion(tiny, FILLS_ALONE), innocent(tiny))
    assert others == undisturbed
    assert (bad.status_code, bad.json()["error"]["code"]) == (500, "engine_failure")
    assert "memory" in bad.json()["error"]["message"]
    assert tiny.engine.pid == pid
    await until(lambda: tiny.engine.state.free_blocks == tiny.engine.state.num_blocks)
