"""The loop of ``pronk top``: look at each server, show it, wait."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field

import httpx
from rich.console import Console, RenderableType
from rich.live import Live

from service.top.figures import Figures, figures
from service.top.scrape import Sample, TopProblem, client_of, scrape
from service.top.screen import SPARKS, screen

WINDOW = 60.0  # seconds that quantiles and keys are over


@dataclass(frozen=True)
class TopSettings:
    urls: Sequence[str]
    api_key: str = field(default="", repr=False)
    interval: float = 2.0
    once: bool = False
    as_json: bool = False


class Watched:
    """One server, and what it said within the window."""

    def __init__(self, client: httpx.Client) -> None:
        self.url = str(client.base_url).rstrip("/")
        self.samples: deque[Sample] = deque()
        self.history: deque[tuple[float, float]] = deque(maxlen=SPARKS)
        self._client = client

    def look(self) -> Figures:
        """What cannot be reached is shown as such: it may come back."""
        try:
            sample = scrape(self._client)
        except TopProblem as problem:
            self.samples.clear()
            return Figures(self.url, trouble=str(problem))
        self.samples.append(sample)
        while sample.moment - self.samples[0].moment > WINDOW and len(self.samples) > 2:
            self.samples.popleft()
        found = figures(self.url, self.samples)
        if len(self.samples) > 1:
            self.history.append((found.generation_rate, found.prompt_rate))
        return found

    @property
    def window(self) -> float:
        return self.samples[-1].moment - self.samples[0].moment if self.samples else 0.0


def watch(settings: TopSettings, console: Console | None = None) -> None:
    """Until Ctrl-C, or once. Raises ``TopProblem`` where no server shows anything at the start."""
    console = console or Console()
    with ExitStack() as stack:
        servers = [
            Watched(stack.enter_context(client_of(url, settings.api_key))) for url in settings.urls
        ]
        pool = stack.enter_context(ThreadPoolExecutor(len(servers)))
        looks = _looks(servers, pool, settings.interval)
        _require_one(next(looks))
        if settings.once:
            _show(servers, next(looks), console, as_json=settings.as_json)
        elif settings.as_json or not console.is_terminal or console.is_dumb_terminal:
            for found in looks:
                _show(servers, found, console, as_json=settings.as_json)
        else:
            _show_live(servers, looks, console)


def _looks(
    servers: Sequence[Watched], pool: ThreadPoolExecutor, interval: float
) -> Iterator[list[Figures]]:
    """All servers at the same moment, every interval; rates need two of them."""
    due = time.monotonic()
    while True:
        yield list(pool.map(Watched.look, servers))
        due = max(due + interval, time.monotonic())
        time.sleep(due - time.monotonic())


def _require_one(found: Sequence[Figures]) -> None:
    if all(one.trouble for one in found):
        raise TopProblem("; ".join(dict.fromkeys(one.trouble for one in found)))


def _show(
    servers: Sequence[Watched], found: Sequence[Figures], console: Console, *, as_json: bool
) -> None:
    if as_json:
        told = {"time": time.time(), "servers": [one.as_json() for one in found]}
        print(json.dumps(told), flush=True)
        return
    console.print(_screen(servers, found))


def _show_live(
    servers: Sequence[Watched], looks: Iterator[list[Figures]], console: Console
) -> None:
    with Live(console=console, screen=True, auto_refresh=False) as live:
        for found in looks:
            live.update(_screen(servers, found), refresh=True)


def _screen(servers: Sequence[Watched], found: Sequence[Figures]) -> RenderableType:
    histories = {server.url: list(server.history) for server in servers}
    return screen(found, histories, max(server.window for server in servers))
