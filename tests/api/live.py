"""A real uvicorn in a thread of its own, for clients that speak over sockets."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

import uvicorn
from fastapi import FastAPI

from service.protocol import HttpProtocol


class Protocol(HttpProtocol):
    head_timeout = 0.5


class _Quiet(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.contextmanager
def listening(app: FastAPI) -> Iterator[str]:
    """The base URL of a server that runs until the block is left."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        config = uvicorn.Config(
            app, http=Protocol, ws="none", lifespan="off", log_config=None, server_header=False
        )
        server = _Quiet(config)
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(10)
