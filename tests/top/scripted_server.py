"""A server that says what it is told to: /readyz and /metrics."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

READY = (200, '{"status":"ready","stage":"ready","progress":1.0,"reason":""}')


class Script:
    """``metrics``: an answer a scrape, the last one again and again."""

    def __init__(self, *metrics: str, readyz: tuple[int, str] = READY, status: int = 200) -> None:
        self.metrics = list(metrics)
        self.readyz = readyz
        self.status = status
        self.keys: list[str | None] = []

    def answer(self, path: str) -> tuple[int, str]:
        if path == "/readyz":
            return self.readyz
        return self.status, self.metrics.pop(0) if len(self.metrics) > 1 else self.metrics[0]


@contextmanager
def scripted(script: Script) -> Iterator[str]:
    """Its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            script.keys.append(self.headers.get("authorization"))
            status, body = script.answer(self.path)
            self.send_response(status)
            self.send_header("content-length", str(len(body.encode())))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
