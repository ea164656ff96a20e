"""Pages of the KV cache as integers: who holds them, what they contain, which to give out next.

The page (block) is the unit of memory, the grain the unit of sharing. A block is in exactly one of
three places: held (``holders > 0``), cached (nobody holds it, but the index knows its content; may
be evicted), or free. Block 0 is never given out. Every operation takes constant time, or the
logarithm of the pool's size. With ``host`` slots an evicted page is stored in one, and matched
there as well (service/engine/host_slots.py).

    pool = BlockPool(num_blocks, block_size, grain=32, enable_prefix_caching=True, host=None)
    pool.match(digests, limit) -> PrefixMatch     longest known prefix of at most limit tokens
    pool.share(block)  pool.allocate() -> block   one more holder; a block of one's own
    pool.release(blocks)                          a holder less each; last pages go first
    pool.register(block, digest, end)             this block holds the grain with that digest
    pool.take_stores()                            (block, slot, first tokens) of pages evicted
    pool.num_free                                 blocks that can be allocated now (free or cached)
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from service.engine.host_slots import HostSlots
from service.engine.prefix import GRAIN


@dataclass(slots=True)
class PrefixMatch:
    """Full pages to share, and perhaps a page whose first tokens are to be copied.

    ``loads`` are (place among the pages, host slot, first tokens): pages to be filled from the
    host. Full ones have block 0 as their place in ``pages``, a part of one comes after the last.
    """

    pages: list[int] = field(default_factory=list)
    source: int | None = None
    source_tokens: int = 0
    num_tokens: int = 0  # of all
    loads: list[tuple[int, int, int]] = field(default_factory=list)

    @property
    def shared(self) -> list[int]:
        """The pages that lie in the pool."""
        return [block for block in self.pages if block]


class BlockPool:
    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        grain: int = GRAIN,
        enable_prefix_caching: bool = True,
        host: HostSlots | None = None,
    ) -> None:
        assert num_blocks >= 2, "block 0 is never given out: at least two are needed"
        assert block_size % grain == 0, "a page holds whole grains"
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.grain = grain
        self.enable_prefix_caching = enable_prefix_caching
        self._holders = [0] * num_blocks
        self._free = list(range(1, num_blocks))  # a heap: the lowest number first
        self._cached: OrderedDict[int, None] = OrderedDict()  # first is evicted first
        self._index: dict[bytes, int] = {}
        self._digests: dict[int, list[bytes]] = {}  # what of the index points at a block
        self.host = HostSlots(0) if host is None else host
        self._filled = [0] * num_blocks  # tokens up to the last grain registered
        self._stores: list[tuple[int, int, int]] = []

    @property
    def num_usable(self) -> int:
        return self.num_blocks - 1

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated now; cached ones count, they can be evicted."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def holders(self, block: int) -> int:
        return self._holders[block]

    def num_idle(self, blocks: Sequence[int]) -> int:
        """How many of these count as free at present."""
        return sum(self._holders[block] == 0 for block in blocks)

    # ---- giving and taking back ----------------------------------------------------------------

    def allocate(self) -> int:
        assert self.num_free, "allocate from an exhausted pool"
        block = heapq.heappop(self._free) if self._free else self._evict()
        assert self._holders[block] == 0, "allocated while held"
        self._holders[block] = 1
        return block

    def share(self, block: int) -> None:
        if self._holders[block] == 0:
            del self._cached[block]
        self._holders[block] += 1

    def touch(self, block: int) -> None:
        """Puts a cached block last in the order of eviction."""
        if self._holders[block] == 0:
            self._cached.move_to_end(block)

    def release(self, blocks: Sequence[int]) -> None:
        """Blocks in the order of a block table: its last pages become the first to be evicted."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            assert self._holders[block] >= 0, "released more often than held"
            if self._holders[block] == 0:
                self._retire(block)

    def _retire(self, block: int) -> None:
        if block in self._digests:
            self._cached[block] = None
        else:
            heapq.heappush(self._free, block)

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        slot = self.host.keep(self._digests[block]) if self.host.num_slots else None
        if slot is not None:
            self._stores.append((block, slot, self._filled[block]))
        self._forget(block)
        return block

    def take_stores(self) -> list[tuple[int, int, int]]:
        """What eviction since the last call wants stored, in this order, before anything is
        written: (block, host slot, first tokens). What is matched from now on is of a later step.
        """
        stores, self._stores = self._stores, []
        self.host.end_step()
        return stores

    # ---- what is known of their content --------------------------------------------------------

    def register(self, block: int, digest: bytes, end: int | None = None) -> None:
        """The grain named by ``digest`` lies, computed, in ``block``. The first to say so stays.

        The caller vouches that the grains before it in the page are in the same block. It ends
        before token ``end`` of the page; None: at the page's own end, at the latest.
        """
        assert self._holders[block] > 0, "only a holder knows what a block contains"
        if self.enable_prefix_caching and digest not in self._index:
            self._index[digest] = block
            self._digests.setdefault(block, []).append(digest)
            self._filled[block] = max(self._filled[block], end or self.block_size)

    def match(self, digests: Sequence[bytes], limit: int) -> PrefixMatch:
        """The longest cached prefix of at most ``limit`` tokens, given its grains' digests."""
        match = PrefixMatch()
        while match.num_tokens < limit:
            block, slot, tokens = self._match_page(digests, match.num_tokens, limit)
            match.num_tokens += tokens
            if slot is not None:
                match.loads.append((len(match.pages), slot, tokens))
            if tokens < self.block_size:
                if tokens and slot is None:
                    match.source, match.source_tokens = block, tokens
                break
            match.pages.append(block)
        return match

    def _match_page(
        self, digests: Sequence[bytes], start: int, limit: int
    ) -> tuple[int, int | None, int]:
        """A block or host slot with the page that starts at ``start``, and its tokens of use.

        From the last grain backwards: who holds a grain holds those of its page before it too. At
        the same length the block is taken, which costs nothing.
        """
        first = start // self.grain
        end = min(first + self.block_size // self.grain, len(digests), -(-limit // self.grain))
        for i in range(end - 1, first - 1, -1):
            tokens = min((i + 1) * self.grain, limit) - start
            block = self._index.get(digests[i])
            if block is not None:
                return block, None, tokens
            slot = self.host.find(digests[i])
            if slot is not None:
                return 0, slot, tokens
        return 0, None, 0

    def _forget(self, block: int) -> None:
        for digest in self._digests.pop(block, ()):
            del self._index[digest]
        self._filled[block] = 0

    def distrust(self, blocks: Sequence[int], digests: Sequence[bytes] = ()) -> None:
        """Held blocks whose content may be wrong: nobody new is to read them.

        ``digests`` are of all they may have been taken for: their copies on the host go too.
        """
        self.host.forget(digests)
        for block in blocks:
            assert self._holders[block] > 0, "distrusted while nobody holds it"
            self.host.forget(self._digests.get(block, ()))
            self._forget(block)

    def forget_all(self) -> None:
        """Empties the prefix cache, the host's part too; what is held stays held."""
        self.host.forget_all()
        for block in list(self._digests):
            self._forget(block)
        for block in self._cached:
            heapq.heappush(self._free, block)
        self._cached.clear()

    def check(self) -> None:
        """Every block is in exactly one place and the index agrees: for tests."""
        held = {block for block, holders in enumerate(self._holders) if holders}
        places = [*self._free, *self._cached, *held]
        assert sorted(places) == list(range(1, self.num_blocks)), "a block is lost or doubled"
        assert all(block in self._digests for block in self._cached)
        assert not any(block in self._digests for block in self._free)
        pointed = [(d, block) for block, digests in self._digests.items() for d in digests]
        assert dict(pointed) == self._index
        assert len(pointed) == len(self._index)
        assert all((block in self._digests) == (n > 0) for block, n in enumerate(self._filled))
        assert all(n <= self.block_size for n in self._filled)
        self.host.check()
