"""A real HTTP server in a thread of its own, for clients that speak over sockets."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from service.http.acceptor import HttpServer
from service.http.connections import Connections, Patience

IMPATIENT = Patience(head=0.5, write=0.5, linger=0.5)


@contextlib.contextmanager
def listening(
    app: FastAPI,
    book: Connections | None = None,
    *,
    certificate: Path | None = None,
    key: Path | None = None,
    keep_alive: int = 5,
) -> Iterator[str]:
    """The base URL of a server that runs until the block is left."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1024)
        config = uvicorn.Config(
            app,
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            server_header=False,
            ssl_certfile=certificate,
            ssl_keyfile=key,
            timeout_keep_alive=keep_alive,
        )
        book = book or Connections(patience=IMPATIENT)
        if (state := getattr(app.state, "server", None)) is not None:
            state.metrics.watch_connections(book)
        server = HttpServer(config, book)
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        scheme = "https" if certificate else "http"
        try:
            yield f"{scheme}://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(10)
