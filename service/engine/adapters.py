"""Adapters in integers: which there are, who uses them, which slot each lies in, whose turn it is.

A version names one loading of one adapter and is never given twice; 0 is the model itself.
"""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable

from service.engine.messages import Submit
from service.engine.sequence import Sequence, Status
from service.errors import InvalidRequest, ModelNotFound

PATIENCE = 0.5  # seconds others may pass whoever waits for a slot


class AdapterTable:
    """At most ``max_adapters`` by name, ``num_slots`` of them on the device at a time.

    One that is unloaded while requests use it stays until the last of them has ended.
    """

    def __init__(self, num_slots: int = 0, max_adapters: int = 0) -> None:
        self.num_slots = num_slots
        self.max_adapters = max_adapters
        self.versions: dict[str, int] = {}  # by name: what new requests may ask for
        self._names: dict[int, str] = {}  # of every version in memory
        self._users: Counter[int] = Counter()  # requests, by version
        self._placed: OrderedDict[int, int] = OrderedDict()  # version: slot, last used last
        self._free = list(range(num_slots))[::-1]
        self._gone: list[int] = []
        self._last_version = 0

    # ---- come and go

    def check_room(self, name: str) -> None:
        """Raises InvalidRequest where one more would be too many."""
        if self.num_slots == 0:
            raise InvalidRequest("This server was started without adapters.")
        if name not in self.versions and len(self.versions) >= self.max_adapters:
            raise InvalidRequest(
                f"This server keeps at most {self.max_adapters} adapters: unload one first."
            )

    def add(self, name: str) -> int:
        """The version of a newly loaded adapter; an older one of that name is retired."""
        self.retire(name)
        self._last_version += 1
        self.versions[name] = self._last_version
        self._names[self._last_version] = name
        return self._last_version

    def retire(self, name: str) -> bool:
        """New requests no longer find it; False where there was none."""
        version = self.versions.pop(name, 0)
        if version and not self._users[version]:
            self._forget(version)
        return version > 0

    def take_gone(self) -> list[int]:
        """Versions nobody will ask for again, each told once: their memory can go."""
        gone, self._gone = self._gone, []
        return gone

    def _forget(self, version: int) -> None:
        del self._names[version]
        del self._users[version]
        if version in self._placed:
            self._free.append(self._placed.pop(version))
        self._gone.append(version)

    # ---- requests

    def check(self, submit: Submit) -> None:
        """Raises ModelNotFound; a retired version still serves the rest of what it began."""
        version = submit.adapter_version
        is_known = self._names.get(version) == submit.adapter
        is_current = self.versions.get(submit.adapter) == version
        if version and not (is_known and (is_current or self._users[version])):
            raise ModelNotFound("The adapter asked for is not loaded any more.")

    def hold(self, version: int) -> None:
        if version:
            self._users[version] += 1

    def release(self, version: int) -> None:
        if not version:
            return
        self._users[version] -= 1
        if not self._users[version] and self.versions.get(self._names[version]) != version:
            self._forget(version)

    def name(self, version: int) -> str:
        return self._names[version]

    # ---- slots

    def place(self, versions: Iterable[int]) -> tuple[dict[int, int], list[tuple[int, int]]]:
        """The slot of each version of one step, and (slot, version) of those to be filled first.

        A version keeps its slot until another one needs it: the least recently used goes.
        """
        wanted = list(dict.fromkeys(versions))
        assert len(wanted) <= self.num_slots, "more adapters in a step than slots"
        fills = []
        for version in wanted:
            if version in self._placed:
                self._placed.move_to_end(version)
        for version in wanted:
            if version not in self._placed:
                slot = self._free.pop() if self._free else self._placed.popitem(last=False)[1]
                self._placed[version] = slot
                fills.append((slot, version))
        return {version: self._placed[version] for version in wanted}, fills

    def forget_fills(self, fills: list[tuple[int, int]]) -> None:
        """The step that was to fill them came to nothing: what lies there is not known."""
        for slot, version in fills:
            if self._placed.pop(version, None) is not None:
                self._free.append(slot)


class AdapterTurns:
    """Who may join those that run, so that never more adapters run than there are slots.

    Whoever needs a slot when none is free waits; requests for the model itself, and for adapters
    that run already, pass. The first that waits is passed for ``PATIENCE`` at most: from then on no
    request with an adapter starts before it, so those that run drain and a slot comes free. Where
    accounts take turns at being the first, each one's time goes on.
    """

    def __init__(self, num_slots: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._num_slots = num_slots
        self._clock = clock
        self._running: set[int] = set()
        self._since: dict[Sequence, float] = {}  # who was the first of those that wait, since when

    def begin(self, running: Iterable[Sequence]) -> None:
        """A step is being filled; those run already."""
        self._running = {sequence.adapter for sequence in running if sequence.adapter}
        if self._since:
            waiting = {one: at for one, at in self._since.items() if one.status is Status.WAITING}
            self._since = waiting

    def joined(self, sequence: Sequence) -> None:
        if sequence.adapter:
            self._running.add(sequence.adapter)

    def next_turn(self) -> Callable[[Sequence], bool]:
        """Whether a waiting sequence may join: to be asked of one after the other, in order."""
        first: Sequence | None = None
        is_held = False

        def may_join(sequence: Sequence) -> bool:
            nonlocal first, is_held
            if not sequence.adapter:
                return True
            has_slot = sequence.adapter in self._running or len(self._running) < self._num_slots
            if not has_slot and first is None:
                first = sequence
                is_held = self._has_waited(sequence)
            return has_slot and not is_held

        return may_join

    def _has_waited(self, sequence: Sequence) -> bool:
        now = self._clock()
        return now - self._since.setdefault(sequence, now) > PATIENCE
