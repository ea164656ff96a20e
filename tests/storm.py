"""Clients that leave at every point of an exchange, and what a server holds before and after."""

from __future__ import annotations

import asyncio
import json
import random
import re
import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from socket import SO_LINGER, SOL_SOCKET
from urllib.parse import urlsplit

import httpx
import psutil

POINTS = ("connect", "head", "body", "sent", "queued", "first", "middle", "end", "stay")
WHOLE = ("sent", "queued")  # where a client may as well wait for a whole answer
AT_ONCE = 100  # clients that are there together
HEAD = (
    "POST /v1/completions HTTP/1.1\r\nHost: storm\r\nContent-Type: application/json\r\n"
    "Connection: close\r\nContent-Length: {length}\r\n\r\n"
)


@dataclass(frozen=True)
class Books:
    """What one reading of the server's metrics and processes says."""

    metrics: dict[str, float]
    descriptors: list[int]  # of the HTTP process, then of the engine
    resident: list[int]

    def sum(self, name: str) -> float:
        return sum(value for key, value in self.metrics.items() if key.split("{")[0] == name)

    @property
    def is_balanced(self) -> bool:
        """Whether everything that came has ended in exactly one way."""
        ends = ("finished", "failed", "cancelled", "rejected")
        ended = sum(self.sum(f"pronk:requests_{end}_total") for end in ends)
        return self.sum("pronk:requests_received_total") == ended

    @property
    def is_idle(self) -> bool:
        gauges = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        busy = sum(self.sum(f"vllm:{gauge}") for gauge in gauges)
        return busy + self.sum("pronk:requests_in_flight") == 0

    def is_no_more_than(self, before: Books) -> bool:
        """Descriptors, tasks and connections: not one more than there were."""
        gauges = ("pronk:event_loop_tasks", "pronk:connections")
        return all(
            now <= then for now, then in zip(self.descriptors, before.descriptors, strict=True)
        ) and all(self.sum(gauge) <= before.sum(gauge) for gauge in gauges)


def read_books(url: str, process: psutil.Process) -> Books:
    """Over a connection that is closed at once; the engine is the process' child."""
    text = httpx.get(f"{url}/metrics", headers={"Connection": "close"}).text
    found = re.findall(r"^([a-z_:]+(?:\{[^}]*\})?) ([-+.0-9e]+)$", text, re.MULTILINE)
    both = [process, *engines_of(process)]
    return Books(
        {name: float(value) for name, value in found},
        [one.num_fds() for one in both],
        [one.memory_info().rss for one in both],
    )


def engines_of(process: psutil.Process) -> list[psutil.Process]:
    return [one for one in process.children() if "worker" in " ".join(one.cmdline())]


@dataclass
class Client:
    """One request, left at ``point``. ``stay`` reads all of it."""

    url: str
    point: str
    body: dict[str, object]
    resets: bool  # or says goodbye
    text: str = ""

    async def run(self) -> str:
        where = urlsplit(self.url)
        reader, writer = await asyncio.open_connection(where.hostname, where.port)
        try:
            await self._until(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            if self.point == "stay":
                raise
        finally:
            if self.resets:
                reset = struct.pack("ii", 1, 0)
                writer.get_extra_info("socket").setsockopt(SOL_SOCKET, SO_LINGER, reset)
            writer.close()
        return self.point

    async def _until(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        body = json.dumps(self.body).encode()
        head = HEAD.format(length=len(body)).encode()
        parts = {"connect": 0, "head": len(head) // 2, "body": len(head) + len(body) // 2}
        writer.write((head + body)[: parts.get(self.point)])
        await writer.drain()
        if self.point in (*parts, "sent"):
            return
        if self.point == "queued":
            await asyncio.sleep(0.02)
            return
        num_events = {"first": 1, "middle": 4, "end": int(str(self.body["max_tokens"])) - 1}
        left = num_events.get(self.point, 1 << 30)
        while left and (line := await reader.readline()):
            if line.startswith(b"data: {"):
                left -= 1
                choices = json.loads(line[6:]).get("choices")
                assert choices is not None, line
                self.text += "".join(choice["text"] for choice in choices)
            elif line.startswith(b"data: [DONE]"):
                return
        assert self.point != "stay", "the stream was cut"


async def solo_text(url: str, prompt: str, max_tokens: int) -> str:
    """What the server writes when nobody else asks."""
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    async with httpx.AsyncClient(timeout=30) as client:
        answer = await client.post(f"{url}/v1/completions", json=body)
    return str(answer.json()["choices"][0]["text"])


async def storm(
    url: str, size: int, seed: int, prompts: list[str], max_tokens: int
) -> tuple[Counter[str], list[tuple[str, str]]]:
    """``size`` clients at random points: how many of each, and the (prompt, text) that stayed."""
    random_ = random.Random(seed)
    room = asyncio.Semaphore(AT_ONCE)
    clients = []
    for _ in range(size):
        point = random_.choice(POINTS)
        body = {
            "prompt": random_.choice(prompts),
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": point not in WHOLE or random_.random() < 0.5,
        }
        clients.append(Client(url, point, body, resets=random_.random() < 0.5))

    async def one(client: Client) -> str:
        async with room:
            return await client.run()

    points = Counter(await asyncio.gather(*map(one, clients)))
    stayed = [(str(one.body["prompt"]), one.text) for one in clients if one.point == "stay"]
    return points, stayed


async def settled(read: Callable[[], Books], before: Books, seconds: float = 10) -> Books:
    """The first books that are balanced, idle and no more than ``before``, or the last ones."""
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    while True:
        books = await asyncio.to_thread(read)
        is_well = books.is_balanced and books.is_idle and books.is_no_more_than(before)
        if is_well or loop.time() > end:
            return books
        await asyncio.sleep(0.1)
