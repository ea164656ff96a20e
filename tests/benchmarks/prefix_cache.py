"""What a shared prefix costs: ``python -m tests.benchmarks.prefix_cache``. No server.

Prints the time to the first token of 1,024 shared and 64 own tokens, with random weights, where the
shared ones are computed, lie in the KV cache, or come back from host memory; then what naming and
matching a prefix costs by itself, without a model.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path

from model.random_checkpoint import SHAPES, write
from service.engine.blocks import BlockPool
from service.engine.host_slots import HostSlots
from service.engine.loading import Loaded, load, warm_up
from service.engine.messages import SamplingSettings, Submit
from service.engine.options import EngineOptions
from service.engine.prefix import PrefixChain, chain_root
from service.engine.scheduler import Scheduler

SHARED, OWN, PAGE = 1024, 64, 256
NUM_BLOCKS = 1 + 5  # one prompt: the next one evicts it


class Bench:
    def __init__(self, loaded: Loaded) -> None:
        self.loaded = loaded
        self._dice = random.Random(0)
        self._vocabulary = loaded.runner.model.config.vocab_size
        self._number = 0
        limits = loaded.limits
        self.scheduler = Scheduler(
            BlockPool(loaded.num_blocks, PAGE, host=HostSlots(loaded.num_host_slots)),
            max_num_seqs=limits.max_num_seqs,
            max_num_batched_tokens=limits.max_num_batched_tokens,
            max_model_len=limits.max_model_len,
        )

    def tokens(self, count: int) -> list[int]:
        return [self._dice.randrange(3, self._vocabulary) for _ in range(count)]

    def seconds(self, prompt: list[int]) -> float:
        """To the first token, which is the only one."""
        began = time.perf_counter()
        settings = SamplingSettings(max_tokens=1, temperature=0.0)
        self.scheduler.add(Submit(self._number, prompt, [settings]))
        self._number += 1
        while (step := self.scheduler.schedule()) is not None:
            self.scheduler.update(step, self.loaded.runner.run(step))
        return time.perf_counter() - began

    def report(self, repeats: int) -> None:
        cold, hit, host = [], [], []
        for _ in range(repeats):
            shared = self.tokens(SHARED)
            cold.append(self.seconds(shared + self.tokens(OWN)))
            hit.append(self.seconds(shared + self.tokens(OWN)))
            self.seconds(self.tokens(SHARED + OWN))  # makes it leave
            loads = self.scheduler.counters.host_loads
            host.append(self.seconds(shared + self.tokens(OWN)))
            assert self.scheduler.counters.host_loads == loads + SHARED // PAGE
        print(f"first token of {SHARED} shared + {OWN} own tokens, ms (median of {repeats}):")
        for name, found in (("computed", cold), ("in the cache", hit), ("from the host", host)):
            print(f"  {name:14} {statistics.median(found) * 1e3:8.1f}")


def walk() -> None:
    """Hash and match 1,024 tokens, both from nothing, in a pool that holds them and in a host."""
    tokens = list(range(SHARED))
    pools = {
        "pool": BlockPool(8, PAGE, host=HostSlots(8)),
        "host": BlockPool(6, PAGE, host=HostSlots(8)),
    }
    chain = PrefixChain(chain_root(b""))
    chain.extend(tokens, SHARED)
    for pool in pools.values():
        blocks = [pool.allocate() for _ in range(SHARED // PAGE)]
        for i, digest in enumerate(chain.digests):
            pool.register(blocks[i * pool.grain // PAGE], digest)
        pool.release(blocks)
    host = pools["host"]
    held = [host.allocate() for _ in range(host.num_free)]
    assert len(held) == host.num_usable
    print(f"naming {SHARED} tokens:   {_microseconds(lambda: _hashed(tokens)):6.1f} us")
    for name, pool in pools.items():
        assert pool.match(chain.digests, SHARED).num_tokens == SHARED

        def match(pool: BlockPool = pool) -> object:
            return pool.match(chain.digests, SHARED)

        print(f"matching in the {name}: {_microseconds(match):6.1f} us")


def _hashed(tokens: list[int]) -> PrefixChain:
    chain = PrefixChain(chain_root(b""))
    chain.extend(tokens, len(tokens))
    return chain


def _microseconds(call: object, repeats: int = 300) -> float:
    assert callable(call)
    best = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - began)
    return best * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=[*SHAPES], default="135m")
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    walk()
    with tempfile.TemporaryDirectory() as folder:
        write(options.shape, Path(folder))
        engine = EngineOptions(
            model=folder,
            socket="",
            device=options.device,
            kv_cache_dtype=options.kv_cache_dtype,
            num_kv_blocks=NUM_BLOCKS,
            max_model_len=SHARED + 2 * OWN,
            host_cache_memory=4 << 30,
        )
        loaded = load(engine, lambda _: None)
    for _ in warm_up(loaded):
        pass
    facts = loaded.facts
    print(f"{options.shape} on {facts['device']}, pages in {facts['kv_cache_dtype']}")
    Bench(loaded).report(options.repeats)


if __name__ == "__main__":
    main()
