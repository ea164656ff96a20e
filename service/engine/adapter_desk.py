"""Loads and unloads adapters at the front ends' wish. Files are read in a thread: steps go on."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, Protocol, TypeVar

from model.lora_config import AdapterNotFound
from service.engine.adapters import AdapterTable
from service.engine.messages import Control, Reply
from service.errors import InvalidRequest, NotFound, PronkError

logger = logging.getLogger("pronk.engine")

Adapter = TypeVar("Adapter")
Answer = Reply | PronkError


class Shelf(Protocol[Adapter]):
    """Where adapters lie in memory; what the desk needs of ``ModelRunner``."""

    def read_adapter(self, folder: str) -> Adapter: ...
    def keep_adapter(self, version: int, adapter: Adapter) -> None: ...
    def drop_adapter(self, version: int) -> None: ...


class AdapterDesk(Generic[Adapter]):
    """The engine's main thread calls everything here; only ``read_adapter`` runs in another."""

    def __init__(self, table: AdapterTable, shelf: Shelf[Adapter]) -> None:
        self._table = table
        self._shelf = shelf
        self._reading: list[tuple[int, Control, Future[Adapter]]] = []
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="adapters")

    @property
    def is_reading(self) -> bool:
        return bool(self._reading)

    def open(self, adapters: Mapping[str, Adapter]) -> None:
        """What was loaded with the model."""
        for name, adapter in adapters.items():
            self._shelf.keep_adapter(self._table.add(name), adapter)

    def load(self, front_end: int, control: Control) -> None:
        """Begin; ``finished`` tells how it went. Raises where there is no room for one more."""
        self._table.check_room(control.adapter)
        future = self._reader.submit(self._shelf.read_adapter, control.path)
        self._reading.append((front_end, control, future))

    def unload(self, control: Control) -> Reply:
        """Requests that use it go on. Raises NotFound."""
        if not self._table.retire(control.adapter):
            raise NotFound("The adapter is not loaded.")
        return Reply(control.id)

    def finished(self) -> list[tuple[int, Control, Answer]]:
        """(front end, what it asked, the answer) of all that were read meanwhile, in order."""
        found = []
        while self._reading and self._reading[0][2].done():
            front_end, control, future = self._reading.pop(0)
            found.append((front_end, control, self._answer(control, future)))
        return found

    def _answer(self, control: Control, future: Future[Adapter]) -> Answer:
        try:
            adapter = future.result()
            self._table.check_room(control.adapter)  # others may have come since
        except PronkError as error:
            return error
        except ValueError as error:
            kind = NotFound if isinstance(error, AdapterNotFound) else InvalidRequest
            return kind(f"The adapter cannot be served: {error}.", param="lora_path")
        except Exception as error:
            logger.error("an adapter could not be read: %s", type(error).__name__, exc_info=error)
            return InvalidRequest("The adapter could not be read.", param="lora_path")
        version = self._table.add(control.adapter)
        self._shelf.keep_adapter(version, adapter)
        return Reply(control.id, {"version": version})

    def clear_away(self) -> None:
        """Give back the memory of what nobody uses any more."""
        for version in self._table.take_gone():
            self._shelf.drop_adapter(version)

    def close(self) -> None:
        self._reader.shutdown(wait=False, cancel_futures=True)
