"""Two keys and a real engine: what one asks for does not shut the other out."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from transformers import LlamaForCausalLM

from tests.api.tiny import Tiny, tiny_checkpoint, tiny_server

KEYS = {"api_key": ["greedy", "modest"]}
PATH = "/v1/completions"
SLOTS, QUEUE = 4, 12


@pytest.fixture(scope="module")
def checkpoint() -> Iterator[tuple[Path, LlamaForCausalLM]]:
    with tiny_checkpoint() as found:
        yield found


async def ask(server: Tiny, key: str, max_tokens: int) -> httpx.Response:
    body = {
        "prompt": [10, 11, 12],
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "logit_bias": {"198": -100},
    }
    headers = {"Authorization": f"Bearer {key}"}
    return await server.http.post(PATH, json=body, headers=headers)


@pytest.mark.parametrize("policy", ["fair", "fcfs"])
async def test_a_short_answer_of_one_key_is_there_before_the_flood_of_another(
    checkpoint: tuple[Path, LlamaForCausalLM], policy: str
) -> None:
    limits = {"max_num_seqs": SLOTS, "scheduling_policy": policy}
    async with tiny_server(*checkpoint, KEYS, **limits) as server:
        flood = [asyncio.create_task(ask(server, "greedy", 150)) for _ in range(40)]
        await asyncio.wait(flood, return_when=asyncio.FIRST_COMPLETED)  # all are in the engine
        answer = await ask(server, "modest", 4)
        num_answered = sum(task.done() for task in flood)
        assert answer.status_code == 200
        assert {task.status_code for task in await asyncio.gather(*flood)} == {200}
    if policy == "fair":
        assert num_answered <= 24, "the first four were through, and perhaps some more"
    else:
        assert num_answered >= 36


async def test_a_queue_full_of_one_keys_requests_refuses_that_key_alone(
    checkpoint: tuple[Path, LlamaForCausalLM],
) -> None:
    limits = {"max_num_seqs": SLOTS, "max_queued_requests": QUEUE}
    async with tiny_server(*checkpoint, KEYS, **limits) as server:
        flood = [asyncio.create_task(ask(server, "greedy", 150)) for _ in range(SLOTS + QUEUE + 10)]
        done, _ = await asyncio.wait(flood, return_when=asyncio.FIRST_COMPLETED)
        refused = done.pop().result()
        assert refused.status_code == 429
        assert "queue is full" in refused.json()["error"]["message"]
        assert int(refused.headers["retry-after"]) >= 1
        answers = await asyncio.gather(*[ask(server, "modest", 4) for _ in range(5)])
        assert {answer.status_code for answer in answers} == {200}
        assert {answer.status_code for answer in await asyncio.gather(*flood)} == {200, 429}
