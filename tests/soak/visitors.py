"""Who comes in a soak: each kind of request, and how it may end when nothing is broken."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from tests.traffic.client import Answer, Client

Visit = Callable[[Client, random.Random], Awaitable[Answer]]
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
USAGE = {"stream": True, "stream_options": {"include_usage": True}}
SCHEMA = {
    "type": "object",
    "properties": {"room": {"enum": ["kitchen", "garden"]}, "floor": {"type": "integer"}},
    "required": ["room", "floor"],
    "additionalProperties": False,
}
OPENINGS = ["Once upon a time", "The old man", "Alice and the cat", "In a quiet wood", "One day"]
SHARED = "There was a house at the end of the lane, and in it lived three sisters. " * 8
BAD: list[tuple[str, dict[str, Any]]] = [
    (COMPLETIONS, {"prompt": ""}),
    (COMPLETIONS, {"prompt": "Hi", "temperature": 9}),
    (COMPLETIONS, {"prompt": "Hi", "max_tokens": 10**9}),
    (COMPLETIONS, {"prompt": "Hi", "structured_outputs": {"regex": "(((("}}),
    (CHAT, {"messages": [{"role": "nobody", "content": "Hi"}]}),
    (CHAT, {"messages": []}),
    ("/v1/embeddings", {"input": []}),
]


@dataclass(frozen=True)
class Kind:
    name: str
    weight: int
    visit: Visit
    endings: frozenset[str] = frozenset({"done", "refused"})


def opening(draw: random.Random) -> str:
    return f"{draw.choice(OPENINGS)} {draw.randrange(1000)}"


def messages(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


async def stream(client: Client, draw: random.Random) -> Answer:
    body = {"prompt": opening(draw), "max_tokens": draw.randrange(8, 64), **USAGE}
    return await client.post(COMPLETIONS, body)


async def chat(client: Client, draw: random.Random) -> Answer:
    body = {"messages": messages(opening(draw)), "max_tokens": draw.randrange(8, 48)}
    return await client.post(CHAT, body)


async def choices(client: Client, draw: random.Random) -> Answer:
    body = {"prompt": opening(draw), "n": draw.randrange(2, 5), "max_tokens": 24, "logprobs": 3}
    return await client.post(COMPLETIONS, body)


async def structured(client: Client, draw: random.Random) -> Answer:
    """A finished answer has to be what the schema says."""
    wanted = {"type": "json_schema", "json_schema": {"name": "place", "schema": SCHEMA}}
    body = {"messages": messages(opening(draw)), "max_tokens": 64, "response_format": wanted}
    answer = await client.post(CHAT, body)
    if answer.is_done:
        choice = json.loads(answer.text)["choices"][0]
        if choice["finish_reason"] == "stop":
            said = json.loads(choice["message"]["content"])
            if set(said) != {"room", "floor"}:
                answer.ending = "another shape than its schema"
    return answer


async def prefix(client: Client, draw: random.Random) -> Answer:
    body = {"prompt": SHARED + opening(draw), "max_tokens": 16, **USAGE}
    return await client.post(COMPLETIONS, body)


async def deadline(client: Client, draw: random.Random) -> Answer:
    body = {"prompt": opening(draw), "max_tokens": 200, "ignore_eos": True, **USAGE}
    return await client.post(COMPLETIONS, body | {"deadline_ms": draw.randrange(20, 400)})


async def beams(client: Client, draw: random.Random) -> Answer:
    body = {"prompt": opening(draw), "n": 2, "max_tokens": 8, "use_beam_search": True}
    return await client.post(COMPLETIONS, body)


async def embeddings(client: Client, draw: random.Random) -> Answer:
    return await client.post("/v1/embeddings", {"input": [opening(draw) for _ in range(4)]})


async def tokenize(client: Client, draw: random.Random) -> Answer:
    return await client.post("/tokenize", {"prompt": opening(draw) * 20})


async def bad(client: Client, draw: random.Random) -> Answer:
    path, body = draw.choice(BAD)
    return await client.post(path, body)


async def leave_stream(client: Client, draw: random.Random) -> Answer:
    body = {"prompt": opening(draw), "max_tokens": 200, "ignore_eos": True, **USAGE}
    return await client.post(COMPLETIONS, body, hurry=draw.uniform(0.01, 0.6))


async def leave_whole(client: Client, draw: random.Random) -> Answer:
    body = {"prompt": opening(draw), "n": 2, "max_tokens": 200, "ignore_eos": True}
    return await client.post(COMPLETIONS, body, hurry=draw.uniform(0.01, 0.6))


async def read_slowly(client: Client, draw: random.Random) -> Answer:
    """A few bytes at a time, with pauses; then on, or away."""
    answer = Answer(asyncio.get_running_loop().time())
    body = {"prompt": opening(draw), "max_tokens": 100, "ignore_eos": True, "stream": True}
    try:
        reader, writer = await _send(client.url, json.dumps(body).encode(), None)
        try:
            for _ in range(draw.randrange(5, 40)):
                if not await reader.read(64):
                    break
                await asyncio.sleep(0.05)
        finally:
            writer.close()
        answer.ending = "left"
    except OSError as error:
        answer.ending = f"no connection: {type(error).__name__}"
    return answer


async def promise(client: Client, draw: random.Random) -> Answer:
    """Half a body, a while of nothing, and gone."""
    answer = Answer(asyncio.get_running_loop().time())
    try:
        _, writer = await _send(client.url, b'{"prompt": "Hi"', 4000)
        await asyncio.sleep(draw.uniform(0.1, 1.0))
        writer.close()
        answer.ending = "left"
    except OSError as error:
        answer.ending = f"no connection: {type(error).__name__}"
    return answer


async def _send(
    url: str, payload: bytes, length: int | None
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port, limit=256)
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: soak\r\nConnection: close\r\n"
    promised = len(payload) if length is None else length
    head += f"Content-Type: application/json\r\nContent-Length: {promised}\r\n\r\n"
    writer.write(head.encode() + payload)
    return reader, writer


LEFT = frozenset({"left", "done", "refused"})
KINDS = [
    Kind("stream", 8, stream),
    Kind("chat", 5, chat),
    Kind("prefix", 4, prefix),
    Kind("choices", 2, choices),
    Kind("structured", 2, structured),
    Kind("deadline", 3, deadline),
    Kind("beams", 1, beams),
    Kind("embeddings", 1, embeddings),
    Kind("tokenize", 1, tokenize),
    Kind("bad", 3, bad, frozenset({"http 400", "refused"})),
    Kind("leave_stream", 3, leave_stream, LEFT),
    Kind("leave_whole", 2, leave_whole, LEFT),
    Kind("read_slowly", 2, read_slowly, LEFT),
    Kind("promise", 1, promise, LEFT),
]
