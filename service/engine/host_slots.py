"""Slots of host memory that keep what the pool evicts, as integers: which hold what, which go next.

A slot holds one page. Its content is copied in before the step that overwrites the page, and out
again, into a fresh page, when somebody asks for that prefix; it stays until the slot is needed.

    slots.keep(digests) -> slot       where a page is to go; None: it is here already, or no slot is
    slots.find(digest) -> slot        who holds that grain
    slots.pin(slot)                   read in this step: nothing else may be stored there
    slots.end_step()                  the next step's stores come after this one's loads
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence


class HostSlots:
    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.num_evictions = 0  # contents that made room for others
        self._free = list(range(num_slots - 1, -1, -1))  # the lowest number is taken first
        self._used: OrderedDict[int, None] = OrderedDict()  # first is evicted first
        self._index: dict[bytes, int] = {}
        self._digests: list[list[bytes]] = [[] for _ in range(num_slots)]
        self._pinned: set[int] = set()

    @property
    def num_used(self) -> int:
        return len(self._used)

    def find(self, digest: bytes) -> int | None:
        return self._index.get(digest)

    def pin(self, slot: int) -> None:
        """It is read in the step being made; it also counts as used just now."""
        self._pinned.add(slot)
        self._used.move_to_end(slot)

    def end_step(self) -> None:
        """Whatever is stored from now on is stored after what was pinned has been read."""
        emptied = [slot for slot in self._pinned if not self._digests[slot]]
        self._pinned.clear()
        for slot in emptied:
            self._release(slot)

    def keep(self, digests: Sequence[bytes]) -> int | None:
        """A slot for the page these grains lie in; from now on it is where they are found.

        Nothing needs to be stored (None) where slots hold all of them; those count as used.
        """
        known = {self._index.get(digest) for digest in digests}
        if None not in known:
            for slot in known:
                assert slot is not None
                self._used.move_to_end(slot)
            return None
        self.forget(digests)  # an older, shorter copy of the same page is of no more use
        slot = self._take()
        if slot is None:
            return None
        for digest in digests:
            self._index[digest] = slot
        self._digests[slot] = list(digests)
        self._used[slot] = None
        return slot

    def _take(self) -> int | None:
        if self._free:
            return self._free.pop()
        slot = next((slot for slot in self._used if slot not in self._pinned), None)
        if slot is None:
            return None
        self.num_evictions += 1
        self.forget(list(self._digests[slot]))
        return self._free.pop()

    def _release(self, slot: int) -> None:
        del self._used[slot]
        self._free.append(slot)

    def forget(self, digests: Iterable[bytes]) -> None:
        """What these name may be wrong, or is elsewhere now."""
        for digest in digests:
            slot = self._index.pop(digest, None)
            if slot is not None:
                self._digests[slot].remove(digest)
                if not self._digests[slot] and slot not in self._pinned:
                    self._release(slot)

    def forget_slots(self, slots: Iterable[int]) -> None:
        """What was to be stored there never was."""
        for slot in slots:
            self.forget(list(self._digests[slot]))

    def forget_all(self) -> None:
        self.forget_slots(list(self._used))

    def check(self) -> None:
        """Every slot is free or used, and the index agrees: for tests."""
        places = [*self._free, *self._used]
        assert sorted(places) == list(range(self.num_slots)), "a slot is lost or doubled"
        assert not any(self._digests[slot] for slot in self._free)
        pointed = [(d, slot) for slot in self._used for d in self._digests[slot]]
        assert dict(pointed) == self._index
        assert len(pointed) == len(self._index)
        assert self._pinned <= set(self._used)
        assert all(self._digests[slot] or slot in self._pinned for slot in self._used)
