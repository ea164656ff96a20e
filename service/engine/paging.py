"""Block tables: how a sequence gets pages, keeps writers apart, leaves what others may share."""

from __future__ import annotations

from service.engine.blocks import BlockPool, PrefixMatch
from service.engine.sequence import Sequence

Copies = list[tuple[int, int, int]]  # (source block, target block, first tokens)
SPARE = 1  # free blocks that guesses leave alone
Loads = list[tuple[int, int, int]]  # (host slot, target block, first tokens)


class Paging:
    def __init__(self, pool: BlockPool) -> None:
        self.pool = pool

    def claim(self, sequence: Sequence, headroom: int, copies: Copies, loads: Loads) -> bool:
        """Gives a sequence without blocks a table for all its tokens, cached prefix included.

        False, and nothing done, unless ``headroom`` blocks would stay free. At least one token is
        left to compute: more, where logits of earlier ones are needed.
        """
        assert not sequence.block_table, "claims twice"
        pool = self.pool
        match = self._match(sequence)
        num_fresh = pool.pages_for(len(sequence.tokens)) - len(match.shared)
        if num_fresh + pool.num_idle(match.shared) + headroom > pool.num_free:
            return False
        self._take(sequence, match, copies)
        for place, slot, tokens in match.loads:
            loads.append((slot, sequence.block_table[place], tokens))
        return True

    def pages_wanted(self, sequence: Sequence) -> int:
        """Free pages that a claim would take now; nothing is touched."""
        shared = self._match(sequence).shared
        pool = self.pool
        return pool.pages_for(len(sequence.tokens)) - len(shared) + pool.num_idle(shared)

    def pages_held_alone(self, sequence: Sequence) -> int:
        """Pages that come free with its end, if nobody else ends."""
        holders = self.pool.holders
        return sum(holders(block) == 1 for block in sequence.block_table)

    def cached_tokens(self, sequence: Sequence) -> int:
        """What a claim would find of it now; nothing is touched."""
        return self._match(sequence).num_tokens

    def _match(self, sequence: Sequence) -> PrefixMatch:
        if not self.pool.enable_prefix_caching:
            return PrefixMatch()
        sequence.chain.extend(sequence.tokens, len(sequence.tokens))
        return self.pool.match(sequence.chain.digests, sequence.first_logits)

    def _take(self, sequence: Sequence, match: PrefixMatch, copies: Copies) -> None:
        """Shares before it allocates, so that no matched page is evicted for its own successor."""
        pool = self.pool
        for block in match.shared:
            pool.share(block)
        for _, slot, _ in match.loads:
            pool.host.pin(slot)
        if match.source is not None:
            pool.touch(match.source)
        num_fresh = pool.pages_for(len(sequence.tokens)) - len(match.pages)
        table = [block or pool.allocate() for block in match.pages]
        sequence.block_table = table + [pool.allocate() for _ in range(num_fresh)]
        if match.source is not None:
            target = sequence.block_table[len(match.pages)]
            # The source itself comes back where it was the last free block: nothing to copy then.
            if target != match.source:
                copies.append((match.source, target, match.source_tokens))
        sequence.num_computed = match.num_tokens
        # Copied and loaded grains are offered after the step: their source may be evicted by then.
        known = next((place for place, _, _ in match.loads), len(match.pages))
        sequence.num_registered = known * pool.block_size // pool.grain

    def is_writable(self, sequence: Sequence) -> bool:
        """Whether the page of its next token is there and its own."""
        page = sequence.num_scheduled // self.pool.block_size
        table = sequence.block_table
        return page < len(table) and self.pool.holders(table[page]) == 1

    def make_writable(self, sequence: Sequence, copies: Copies) -> None:
        """A fresh last page, or a private copy of a shared one. Takes one free block."""
        page, used = divmod(sequence.num_scheduled, self.pool.block_size)
        block = self.pool.allocate()
        if page == len(sequence.block_table):
            sequence.block_table.append(block)
            return
        shared = sequence.block_table[page]
        copies.append((shared, block, used))
        sequence.block_table[page] = block
        self.pool.release([shared])

    def reach_ahead(self, sequence: Sequence, count: int) -> int:
        """How many tokens past its next one it can write, at most ``count``.

        Into pages of its own: fresh ones only while others stay free. What follows the page of the
        next token is never shared.
        """
        table, size = sequence.block_table, self.pool.block_size
        first = sequence.num_computed + 1
        while len(table) * size < first + count and self.pool.num_free > SPARE:
            table.append(self.pool.allocate())
        return min(count, len(table) * size - first)

    def share(self, sequence: Sequence) -> None:
        """One more holder for every page of a table just forked."""
        for block in sequence.block_table:
            self.pool.share(block)

    def register(self, sequence: Sequence) -> None:
        """Tells the pool of the grains computed since last time: others may share them now."""
        pool = self.pool
        computed = sequence.num_computed // pool.grain
        if computed == sequence.num_registered or not pool.enable_prefix_caching:
            return
        sequence.chain.extend(sequence.tokens, sequence.num_computed)
        grains_a_page = pool.block_size // pool.grain
        for i in range(sequence.num_registered, computed):
            page, place = divmod(i, grains_a_page)
            end = (place + 1) * pool.grain
            pool.register(sequence.block_table[page], sequence.chain.digests[i], end)
        sequence.num_registered = computed

    def release(self, sequence: Sequence) -> None:
        """Gives all blocks back; what they hold stays known until they are needed."""
        self.pool.release(sequence.block_table)
        sequence.forget_pages()

    def wants_page_soon(self, sequence: Sequence) -> bool:
        """Whether it will need one more block within a grain of tokens."""
        room = len(sequence.block_table) * self.pool.block_size - sequence.length
        return room < min(self.pool.grain, sequence.settings.max_tokens - sequence.num_output)
