"""Every key this server takes, and the file they come from, read again when it changes."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from service.keys.file import KeysProblem, check_distinct, exposure, parse_keys, read_bytes
from service.keys.key import Key, hash_of, new_key

logger = logging.getLogger("pronk.keys")

POLL = 1.0  # seconds between two looks at the file


class Keyring:
    """Keys of ``--api-key``, which have every right and no limit, and those of the keys file.

    ``own_key`` is one more, for callers in this process. Without any keys the server is open.
    Raises ``KeysProblem`` where the file cannot be used at the start; later the old keys stay.
    """

    def __init__(
        self,
        fixed: Sequence[str] = (),
        path: Path | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.path = path
        self.clock = clock  # seconds since the epoch
        self.is_open = not fixed and path is None
        self.own_key = new_key()
        self.is_current = True  # False: what the file says now cannot be used
        self.num_reloads = 0
        self.on_change: list[Callable[[Sequence[Key]], None]] = []
        self._fixed = _fixed_keys([*dict.fromkeys(fixed)], self.own_key)
        self._content: bytes | None = None
        self._install(() if path is None else self._read(path))

    @property
    def keys(self) -> Sequence[Key]:
        return self._keys

    @property
    def from_file(self) -> Sequence[Key]:
        return self._keys[len(self._fixed) :]

    def find(self, offered: str) -> Key | None:
        """Compared by SHA-256 with every key, in constant time, whichever it is."""
        digest = bytes.fromhex(hash_of(offered.strip()))
        found = None
        for known, key in self._digests:
            if hmac.compare_digest(known, digest):
                found = key
        return found

    async def watch(self, interval: float = POLL) -> None:
        """Take the file's keys whenever its content changes, until cancelled."""
        while self.path is not None:
            await asyncio.sleep(interval)
            await self.reload()

    async def reload(self) -> None:
        """In a thread but for the change itself, so that streams go on."""
        assert self.path is not None
        try:
            keys = await asyncio.to_thread(self._read, self.path)
        except KeysProblem as problem:
            self._complain(str(problem))
            return
        except Exception as error:  # a bug: without further looks no key could be revoked
            self._complain(f"cannot read the keys file {self.path}: {type(error).__name__}", error)
            return
        if keys is not None:
            self._install(keys)
            self.num_reloads += 1
            logger.info("the keys file was read again: it has %d keys", len(keys))

    def _read(self, path: Path) -> tuple[Key, ...] | None:
        """None where it says what it said before. All of it is read at every look: unlike its
        dates, its content cannot change unseen."""
        content = read_bytes(path)
        if content == self._content and self.is_current:
            return None
        keys = parse_keys(content, path)
        check_distinct([*self._fixed, *keys], path)
        if warning := exposure(path):
            logger.warning(warning)
        self._content = content
        return keys

    def _install(self, keys: tuple[Key, ...] | None) -> None:
        self._keys = (*self._fixed, *(keys or ()))
        self._digests = [(key.digest, key) for key in self._keys]
        self.is_current, self._problem = True, ""
        for changed in self.on_change:
            changed(self.from_file)

    def _complain(self, problem: str, bug: Exception | None = None) -> None:
        """Once for each way it is broken, not at every look."""
        self.is_current = False
        if problem != self._problem:
            self._problem = problem
            logger.error("%s; the keys read before stay in force", problem, exc_info=bug)


def _fixed_keys(fixed: Sequence[str], own: str) -> tuple[Key, ...]:
    names = ["(api-key)", *(f"(api-key {number})" for number in range(2, len(fixed) + 1))]
    named = [*zip(fixed, names, strict=False), (own, "(server)")]
    return tuple(Key(name=name, sha256=hash_of(key), admin=True) for key, name in named)
