"""Two thousand requests and more while every replica is restarted twice: none is lost."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from typing import Any

import pytest

from tests.deploy.cluster import HAS_BALANCER, NO_BALANCER, Cluster, running_cluster
from tests.traffic.client import Answer, Client

pytestmark = [
    pytest.mark.container,
    pytest.mark.skipif(not HAS_BALANCER, reason=NO_BALANCER),
]

NUM_REQUESTS = 2000
NUM_CLIENTS = 16
ROUNDS = 2
CHAT = {"messages": [{"role": "user", "content": "Tell me a story."}]}
USAGE = {"stream": True, "stream_options": {"include_usage": True}}
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": "Once upon a time", "max_tokens": 12, "ignore_eos": True}),
    ("/v1/completions", {"prompt": "The old man", "max_tokens": 16, "ignore_eos": True, **USAGE}),
    ("/v1/chat/completions", {**CHAT, "max_tokens": 16, "ignore_eos": True, **USAGE}),
    ("/v1/completions", {"prompt": "Alice", "max_tokens": 160, "ignore_eos": True, **USAGE}),
]


async def roll(cluster: Cluster) -> list[Answer]:
    """Every other client keeps its connections; each goes through all kinds of requests."""
    answers: list[Answer] = []
    is_restarting = True

    async def client(number: int) -> None:
        asker = Client(cluster.url, reuse=number % 2 == 0)
        for turn in itertools.count(number):
            if not is_restarting and len(answers) >= NUM_REQUESTS:
                break
            path, body = KINDS[turn % len(KINDS)]
            answer = await asker.post(path, body)
            if answer.is_done and answer.tokens != body["max_tokens"]:
                answer.ending = f"{answer.tokens} tokens of {body['max_tokens']}"
            answers.append(answer)
        await asker.close()

    clients = [asyncio.create_task(client(number)) for number in range(NUM_CLIENTS)]
    try:
        for number in list(range(len(cluster.replicas))) * ROUNDS:
            await asyncio.to_thread(cluster.restart, number)
            await asyncio.sleep(1.5)  # the balancer sees it ready before the other one goes
    finally:
        is_restarting = False
        await asyncio.gather(*clients)
    return answers


def test_a_rolling_restart_of_two_thousand_requests_loses_none() -> None:
    start = time.monotonic()
    with running_cluster() as cluster:
        answers = asyncio.run(roll(cluster))
    endings = Counter(answer.ending for answer in answers)
    failed = [answer for answer in answers if not answer.is_done]
    longest = max(answer.seconds for answer in answers)
    print(
        f"{len(answers)} requests through {2 * ROUNDS} restarts in {time.monotonic() - start:.0f} "
        f"s, {len(failed)} failed; the longest took {longest:.1f} s"
    )
    assert failed == []
    assert endings.total() >= NUM_REQUESTS
