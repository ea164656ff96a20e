"""The engine's end of the seam: one Unix socket, any number of front ends, polled between steps.

Only the engine's main thread polls and reads. A second thread may accept and send (the heartbeat,
also while a model loads), which is why everything but the wait itself holds a lock.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import threading
from dataclasses import dataclass, field
from pathlib import Path

from service.engine.framing import BrokenFrame, FrameReader, encode_frame
from service.engine.messages import FromEngine, State, ToEngine
from service.engine.options import SOCKET_FOLDER_PREFIX

RECEIVE_BYTES = 1 << 20
MAX_RECEIVES = 64  # a poll, one front end: a flood of commands must not keep a step from starting
MAX_UNSENT = 64 << 20  # bytes a front end may fall behind before it counts as lost


@dataclass(frozen=True, slots=True)
class Lost:
    """A front end is gone: everything it asked for is to be cancelled."""


Event = tuple[int, ToEngine | Lost]  # (number of the front end, what came from it)


@dataclass(slots=True, eq=False)
class FrontEnd:
    number: int
    socket: socket.socket
    reader: FrameReader[ToEngine] = field(default_factory=lambda: FrameReader(ToEngine))
    unsent: bytearray = field(default_factory=bytearray)


class Connections:
    """Listens on ``path`` from the moment it is made; ``close`` removes the socket file."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self._lock = threading.RLock()
        self._selector = selectors.DefaultSelector()
        self._front_ends: dict[int, FrontEnd] = {}
        self._lost: list[int] = []
        self._next_number = 0
        self._greeting: bytes = b""
        self._listener = _listen(self._path)
        self._selector.register(self._listener, selectors.EVENT_READ)

    @property
    def num_connected(self) -> int:
        return len(self._front_ends)

    def poll(self, timeout: float | None) -> list[Event]:
        """What front ends sent; waits up to ``timeout`` seconds (None: for ever) for the first."""
        ready = self._selector.select(0 if self._lost else timeout)
        events: list[Event] = []
        with self._lock:
            for key, mask in ready:
                if key.fileobj is self._listener:
                    self.accept()
                elif isinstance(key.data, FrontEnd) and key.data.number in self._front_ends:
                    events += self._attend(key.data, mask)
            events += [(number, Lost()) for number in self._lost]
            self._lost.clear()
        return events

    def accept(self) -> None:
        """Take in whoever is knocking and greet it with the latest state. Never blocks."""
        with self._lock, contextlib.suppress(BlockingIOError):
            while True:
                connection, _ = self._listener.accept()
                connection.setblocking(False)
                front_end = FrontEnd(self._next_number, connection)
                self._next_number += 1
                self._front_ends[front_end.number] = front_end
                self._selector.register(connection, selectors.EVENT_READ, front_end)
                self._write(front_end, self._greeting)

    def send(self, number: int, message: FromEngine) -> None:
        """Queue for one front end; nothing happens when it is gone."""
        frame = encode_frame(message)
        with self._lock:
            if front_end := self._front_ends.get(number):
                self._write(front_end, frame)

    def broadcast(self, state: State) -> None:
        """Tell every front end, and those who come later until the next broadcast."""
        frame = encode_frame(state)
        with self._lock:
            self._greeting = frame
            for front_end in list(self._front_ends.values()):
                self._write(front_end, frame)

    def close(self) -> None:
        with self._lock:
            for front_end in list(self._front_ends.values()):
                self._flush_and_close(front_end)
            self._front_ends.clear()
            self._listener.close()
            self.unlink()

    def unlink(self) -> None:
        """Remove the socket file, and its folder when that was made for it alone."""
        with contextlib.suppress(OSError):
            self._path.unlink()
        if self._path.parent.name.startswith(SOCKET_FOLDER_PREFIX):
            with contextlib.suppress(OSError):
                self._path.parent.rmdir()

    def _attend(self, front_end: FrontEnd, mask: int) -> list[Event]:
        if mask & selectors.EVENT_WRITE:
            self._write(front_end, b"")
        if not mask & selectors.EVENT_READ or front_end.number not in self._front_ends:
            return []
        messages: list[ToEngine] = []
        try:
            for _ in range(MAX_RECEIVES):
                data = front_end.socket.recv(RECEIVE_BYTES)
                if not data:
                    raise ConnectionResetError
                messages += front_end.reader.feed(data)
        except BlockingIOError:
            pass
        except (OSError, BrokenFrame):
            self._lose(front_end)
        return [(front_end.number, message) for message in messages]

    def _write(self, front_end: FrontEnd, frame: bytes) -> None:
        """Send what the socket takes now; the rest goes when ``poll`` finds it writable."""
        front_end.unsent += frame
        try:
            while front_end.unsent:
                sent = front_end.socket.send(front_end.unsent)
                del front_end.unsent[:sent]
        except BlockingIOError:
            pass
        except OSError:
            return self._lose(front_end)
        if len(front_end.unsent) > MAX_UNSENT:
            return self._lose(front_end)
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if front_end.unsent else 0)
        if self._selector.get_key(front_end.socket).events != wanted:
            self._selector.modify(front_end.socket, wanted, front_end)
        return None

    def _lose(self, front_end: FrontEnd) -> None:
        if self._front_ends.pop(front_end.number, None):
            self._selector.unregister(front_end.socket)
            front_end.socket.close()
            self._lost.append(front_end.number)

    def _flush_and_close(self, front_end: FrontEnd) -> None:
        with contextlib.suppress(OSError):
            front_end.socket.settimeout(1.0)
            front_end.socket.sendall(front_end.unsent)
        front_end.socket.close()


def _listen(path: Path) -> socket.socket:
    if path.parent.name.startswith(SOCKET_FOLDER_PREFIX):
        path.parent.mkdir(mode=0o700, exist_ok=False)  # only this user may enter
    with contextlib.suppress(FileNotFoundError):
        path.unlink()  # left by an engine that was killed
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(str(path))
        os.chmod(path, 0o600)
        listener.listen(64)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener
