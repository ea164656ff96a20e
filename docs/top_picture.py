"""Draws docs/images/top.svg from a real run: ``python -m docs.top_picture``, about a minute.

The bundled model serves keys whose requests come all the time; one of them asks for more at a time
than it may. What ``pronk top`` shows at its last look is the picture.
"""

from __future__ import annotations

import io
import random
import re
import tempfile
import threading
import time
from pathlib import Path

import httpx
from rich.console import Console

from service.keys.editing import add_key
from service.keys.key import Key, hash_of, new_id, new_key
from service.top.scrape import client_of
from service.top.screen import screen
from service.top.watch import Watched
from tests.running import serving

FONT = re.compile(r"\s*@font-face \{.*?\n    \}", re.DOTALL)  # fetched from elsewhere
PICTURE = Path(__file__).parent / "images" / "top.svg"
FLAGS = ["--no-sample", "--threads", "1", "--num-kv-blocks", "24", "--max-num-seqs", "12"]
CLIENTS = {"alice": 3, "nightly-batch": 14, "demo": 1}  # requests at a time
MOST = {"nightly-batch": 11}
LOOKS, INTERVAL = 24, 1.0
SHARED = "Once upon a time there was a small house at the edge of a forest. "


def make_keys(path: Path) -> dict[str, str]:
    """The file, and the secrets by name."""
    secrets = {name: new_key() for name in (*CLIENTS, "ops")}
    for name, secret in secrets.items():
        fields = {"name": name, "id": new_id(), "sha256": hash_of(secret), "admin": name == "ops"}
        add_key(path, Key.model_validate(fields | {"max_concurrency": MOST.get(name)}))
    return secrets


def keep_asking(url: str, key: str, seed: int, has_ended: threading.Event) -> None:
    draw = random.Random(seed)
    with httpx.Client(headers={"Authorization": f"Bearer {key}"}, timeout=60) as client:
        while not has_ended.wait(draw.expovariate(4)):
            prompt = SHARED * draw.randint(1, 6) + str(draw.random())
            body = {"prompt": prompt, "max_tokens": draw.randint(60, 160), "ignore_eos": True}
            client.post(f"{url}/v1/completions", json=body)


def watched_run(url: str, secrets: dict[str, str]) -> str:
    has_ended = threading.Event()
    clients = [
        threading.Thread(target=keep_asking, args=(url, secrets[name], seed, has_ended))
        for name, count in CLIENTS.items()
        for seed in range(len(name), len(name) + count)
    ]
    for client in clients:
        client.start()
    try:
        with client_of(url, secrets["ops"]) as client:
            server = Watched(client)
            for _ in range(LOOKS):
                time.sleep(INTERVAL)
                found = server.look()
    finally:
        has_ended.set()
        for thread in clients:
            thread.join()
    console = Console(record=True, width=100, file=io.StringIO(), force_terminal=True)
    console.print(screen([found], {server.url: server.history}, server.window))
    drawn = console.export_svg(title="pronk top", unique_id="top")
    return FONT.sub("", drawn)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        keys = Path(folder) / "keys.toml"
        secrets = make_keys(keys)
        with serving(*FLAGS, "--api-keys-file", str(keys), port=8000) as server:
            PICTURE.write_text(watched_run(server.url, secrets))


if __name__ == "__main__":
    main()
