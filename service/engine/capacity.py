"""How many pages the KV cache gets and what that leaves of the limits asked for. Integers only."""

from __future__ import annotations

from dataclasses import dataclass, replace

from service.engine.options import EngineOptions

CPU_SHARE = 0.4  # of the memory still available once the model is loaded; touched page by page
CPU_DEFAULTS = (64, 512)  # max_num_seqs, max_num_batched_tokens
GPU_DEFAULTS = (256, 8192)
MIB = 1 << 20
LONGEST_STEP = 0.5  # seconds: commands, hang-ups and decoding neighbours wait for a step to end
MOST_PROPOSED = 128  # in one step: many more rows than this are bound by computing anywhere
LEAST_BUDGET = 256  # tokens; below it prompts lose more speed than the others gain


class NotEnoughMemory(ValueError):
    """The cache asked for does not fit; the message says what would."""


@dataclass(frozen=True)
class Limits:
    """What this engine holds itself to. ``max_model_len`` may be below the checkpoint's."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    block_size: int
    max_proposed: int = 0  # tokens guessed ahead in one step, of all sequences

    @property
    def max_rows(self) -> int:
        """Rows of a step: a proposed token is one."""
        return self.max_num_seqs + self.max_proposed

    @property
    def blocks_a_sequence(self) -> int:
        return -(-self.max_model_len // self.block_size)


def limits_wanted(options: EngineOptions, max_positions: int, is_gpu: bool) -> Limits:
    """Raises ``ValueError`` for a length the model was not made for."""
    seqs, batched = GPU_DEFAULTS if is_gpu else CPU_DEFAULTS
    length = options.max_model_len or max_positions
    if length > max_positions:
        raise ValueError(
            f"max_model_len is {length}, this model handles at most {max_positions} positions"
        )
    num_seqs = options.max_num_seqs or seqs
    budget = max(options.max_num_batched_tokens or batched, num_seqs)  # every sequence may decode
    proposed = min(options.num_speculative_tokens * num_seqs, MOST_PROPOSED)
    return Limits(num_seqs, budget, length, options.block_size, proposed)


def num_blocks(
    options: EngineOptions, limits: Limits, block_bytes: int, budget: int, available: int
) -> int:
    """Pages to allocate, block 0 included. ``budget`` bytes by default, never past ``available``.

    Raises ``NotEnoughMemory`` when not even the shortest useful sequence fits.
    """
    useful = limits.max_num_seqs * limits.blocks_a_sequence + 1
    if options.num_kv_blocks is not None:
        count = options.num_kv_blocks
    elif options.kv_cache_memory is not None:
        count = options.kv_cache_memory // block_bytes
    else:
        count = min(useful, budget // block_bytes)
    if count * block_bytes > available:
        raise NotEnoughMemory(
            f"a KV cache of {_mib(count * block_bytes)} does not fit into the "
            f"{_mib(available)} available: lower kv_cache_memory or num_kv_blocks"
        )
    if count < 2:
        raise NotEnoughMemory(
            f"the KV cache gets {_mib(min(budget, available))}, a page of {limits.block_size} "
            f"tokens takes {_mib(block_bytes)}: free memory, or lower block_size"
        )
    return count


def num_host_slots(options: EngineOptions, block_bytes: int, available: int) -> int:
    """Pages that host memory keeps of those evicted; 0 unless asked for.

    Raises ``NotEnoughMemory`` where that is less than one page, or more than there is.
    """
    asked = options.host_cache_memory
    if not asked:
        return 0
    if asked > available:
        raise NotEnoughMemory(
            f"host_cache_memory is {_mib(asked)}, {_mib(available)} are available: lower it"
        )
    if asked < block_bytes:
        raise NotEnoughMemory(
            f"host_cache_memory is {_mib(asked)}, a page of {options.block_size} tokens takes "
            f"{_mib(block_bytes)}: raise it, or lower block_size"
        )
    return asked // block_bytes


def limits_that_fit(options: EngineOptions, limits: Limits, num_blocks: int) -> Limits:
    """``limits`` with a length one sequence can reach.

    Raises ``NotEnoughMemory`` when a longer one was asked for.
    """
    reachable = (num_blocks - 1) * limits.block_size
    if reachable >= limits.max_model_len:
        return limits
    if options.max_model_len is not None:
        raise NotEnoughMemory(
            f"max_model_len is {limits.max_model_len}, the KV cache holds {reachable} tokens: "
            f"lower it, or give the cache more memory"
        )
    return replace(limits, max_model_len=reachable)


def limits_that_keep_pace(options: EngineOptions, limits: Limits, tokens_a_second: float) -> Limits:
    """``limits`` with a budget that takes about ``LONGEST_STEP``, unless one was asked for."""
    budget = max(LEAST_BUDGET, 2 * limits.max_num_seqs, int(LONGEST_STEP * tokens_a_second))
    if options.max_num_batched_tokens is not None or budget >= limits.max_num_batched_tokens:
        return limits
    return replace(limits, max_num_batched_tokens=budget)


def _mib(count: int) -> str:
    return f"{count / MIB:.0f} MiB" if count >= 10 * MIB else f"{count / MIB:.1f} MiB"
