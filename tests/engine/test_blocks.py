"""The pool of pages: exact books, the order of giving out and of forgetting, prefixes by grains."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engine.blocks import BlockPool, PrefixMatch
from service.engine.prefix import PrefixChain, chain_root

PAGE, GRAIN = 8, 2


def a_pool(num_blocks: int = 6, caching: bool = True) -> BlockPool:
    return BlockPool(num_blocks, PAGE, GRAIN, enable_prefix_caching=caching)


def names(*tokens: int, namespace: bytes = b"") -> list[bytes]:
    chain = PrefixChain(chain_root(namespace), GRAIN)
    chain.extend(list(tokens), len(tokens))
    return chain.digests


def fill(pool: BlockPool, *tokens: int) -> list[int]:
    """Blocks that hold these tokens, computed and registered."""
    blocks = [pool.allocate() for _ in range(pool.pages_for(len(tokens)))]
    for i, digest in enumerate(names(*tokens)):
        page, start = divmod(i * GRAIN, PAGE)
        pool.register(blocks[page], digest, start + GRAIN)
    return blocks


def test_block_zero_is_never_given_out_and_the_lowest_number_comes_first() -> None:
    pool = a_pool()
    blocks = [pool.allocate() for _ in range(pool.num_usable)]
    assert blocks == [1, 2, 3, 4, 5]
    pool.release([4])
    pool.release([2])
    assert (pool.allocate(), pool.allocate()) == (2, 4)
    assert pool.num_free == 0


def test_an_exhausted_pool_gives_nothing_and_nothing_is_released_twice() -> None:
    pool = a_pool(2)
    block = pool.allocate()
    with pytest.raises(AssertionError):
        pool.allocate()
    pool.release([block])
    with pytest.raises(AssertionError):
        pool.release([block])


def test_a_block_is_free_when_its_last_holder_leaves() -> None:
    pool = a_pool()
    block = pool.allocate()
    pool.share(block)
    pool.release([block])
    assert (pool.holders(block), pool.num_free) == (1, 4)
    pool.release([block])
    assert (pool.holders(block), pool.num_free) == (0, 5)


def test_cached_pages_count_as_free_and_go_only_when_no_other_is_left() -> None:
    pool = a_pool(4)
    pool.release(fill(pool, *range(8)))  # block 1
    assert (pool.num_free, pool.num_cached) == (3, 1)
    assert [pool.allocate(), pool.allocate()] == [2, 3]
    assert pool.match(names(*range(8)), 8).pages == [1]
    assert pool.allocate() == 1
    assert pool.match(names(*range(8)), 8) == PrefixMatch()


def test_the_last_pages_of_the_longest_unused_are_evicted_first() -> None:
    pool = a_pool(5)
    old, new = fill(pool, *range(16)), fill(pool, *range(50, 66))
    pool.release(old)
    pool.release(new)
    assert [pool.allocate() for _ in range(4)] == [old[1], old[0], new[1], new[0]]


def test_touching_and_sharing_save_a_page_from_eviction() -> None:
    pool = a_pool(4)
    first, second, third = (fill(pool, *range(i, i + 8))[0] for i in (0, 20, 40))
    pool.release([first])
    pool.release([second])
    pool.release([third])
    pool.touch(first)
    pool.share(second)
    assert (pool.allocate(), pool.allocate()) == (third, first)


def test_a_prefix_matches_by_whole_pages_and_then_by_grains() -> None:
    pool = a_pool()
    first, second = fill(pool, *range(14))
    match = pool.match(names(*range(12), 99, 99), 14)
    assert match == PrefixMatch([first], second, 4, 12)
    assert pool.match(names(*range(8), 99, 99), 10) == PrefixMatch([first], None, 0, 8)
    assert pool.match(names(99, *range(1, 14)), 14) == PrefixMatch()


def test_a_match_stops_at_the_limit_even_inside_a_grain() -> None:
    pool = a_pool()
    first, second = fill(pool, *range(16))
    digests = names(*range(16))
    assert pool.match(digests, 16) == PrefixMatch([first, second], None, 0, 16)
    assert pool.match(digests, 15) == PrefixMatch([first], second, 7, 15)
    assert pool.match(digests, 8) == PrefixMatch([first], None, 0, 8)
    assert pool.match(digests, 7) == PrefixMatch([], first, 7, 7)
    assert pool.match(digests, 0) == PrefixMatch()


def test_the_first_to_hold_a_content_stays_and_a_longer_one_goes_on() -> None:
    """A second page with the same beginning is known only by what it alone holds."""
    pool = a_pool()
    (first,) = fill(pool, *range(4))
    (second,) = fill(pool, *range(8))
    assert pool.match(names(*range(4)), 4).source == first
    assert pool.match(names(*range(8)), 8).pages == [second]
    pool.release([first])
    pool.release([second])
    pool.check()


def test_a_page_that_lost_its_beginning_to_another_still_matches_by_its_end() -> None:
    pool = a_pool(3)
    (first,) = fill(pool, *range(4))
    (second,) = fill(pool, *range(6))
    pool.release([first])
    assert pool.allocate() == first  # evicted: grains 0 and 1 are known no longer
    assert pool.match(names(*range(6)), 6) == PrefixMatch([], second, 6, 6)


def test_another_namespace_finds_nothing() -> None:
    pool = a_pool()
    fill(pool, *range(8))
    assert pool.match(names(*range(8), namespace=b"other"), 8) == PrefixMatch()


def test_without_prefix_caching_nothing_is_kept() -> None:
    pool = a_pool(caching=False)
    pool.release(fill(pool, *range(16)))
    assert (pool.num_cached, pool.num_free) == (0, 5)
    assert pool.match(names(*range(16)), 16) == PrefixMatch()


def test_forgetting_all_leaves_held_blocks_alone() -> None:
    pool = a_pool()
    held, released = fill(pool, *range(8)), fill(pool, *range(20, 28))
    pool.release(released)
    pool.forget_all()
    pool.check()
    assert (pool.num_free, pool.num_cached) == (4, 0)
    assert pool.match(names(*range(8)), 8) == PrefixMatch()
    pool.release(held)
    assert pool.num_free == pool.num_usable


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 30)), max_size=60))
def test_any_order_of_operations_loses_no_block(moves: list[tuple[int, int]]) -> None:
    pool, held = a_pool(7), []
    for move, number in moves:
        if move == 0 and pool.num_free:
            held.append(pool.allocate())
        elif move == 1 and held:
            pool.release([held.pop(number % len(held))])
        elif move == 2 and held:
            pool.register(held[number % len(held)], bytes([number]))
        elif move == 3:
            digests = [bytes([number]), bytes([number + 1])]
            match = pool.match(digests, 4)
            if match.source is not None:
                pool.share(match.source)
                held.append(match.source)
        pool.check()
        assert pool.num_free == pool.num_usable - len(set(held))
        assert all(pool.holders(block) == held.count(block) for block in range(7))
