"""What another request left in a page is never read: real pages of a real network, poisoned.

Before each step everything that nobody may read is overwritten: pages that are free, page 0, and
what lies behind the last computed token of each sequence's own pages. The same schedule over clean
memory must give the same to the last bit, and each answer must be the one it gives alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from service.engine.blocks import BlockPool
from service.engine.host_slots import HostSlots
from service.engine.loading import Loaded, load
from service.engine.messages import Output, SamplingSettings, Submit
from service.engine.options import EngineOptions
from service.engine.scheduler import Scheduler
from service.engine.step import Step
from tests.engine.checkpoints import NAN_TOKEN, write_tiny_llama

pytestmark = pytest.mark.usefixtures("one_thread")

BLOCK, NUM_BLOCKS = (
    32,
    16,
)  # so few that sequences are preempted and pages change hands all the time
Answers = dict[tuple[int, int], list[Output]]
Poison = Callable[[Loaded, Scheduler, Step | None], int]  # positions poisoned


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    write_tiny_llama(folder)
    return folder


@pytest.fixture(scope="module", params=["float32", "bfloat16", "int8", "host"])
def loaded(folder: Path, request: pytest.FixtureRequest) -> Loaded:
    options = EngineOptions(
        model=str(folder),
        socket="",
        device="cpu",
        threads=1,
        block_size=BLOCK,
        num_kv_blocks=NUM_BLOCKS,
        max_model_len=200,
        max_num_batched_tokens=40,
        max_num_seqs=8,
        dtype="bfloat16" if request.param == "bfloat16" else "auto",  # on the compiled kernels
        kv_cache_dtype="int8" if request.param == "int8" else "auto",
        host_cache_memory=1 << 19 if request.param == "host" else 0,
    )
    return load(options, lambda _: None)


def submits() -> list[Submit]:
    """Prefixes in common (of pages, and of a part of one), forks, and namespaces that share
    neither; three of them follow once the others have filled the cache."""
    whole = [(7 * i) % 150 + 3 for i in range(120)]
    greedy = SamplingSettings(temperature=0.0, max_tokens=30, logprobs=2)
    drawn = [
        SamplingSettings(
            seed=5, choice=i, max_tokens=24, logprobs=0, logit_bias={NAN_TOKEN: -100.0}
        )
        for i in range(3)
    ]
    prompts = [whole, whole[:75], [*whole[:75], 9, 9], whole[:40], whole[20:110], whole[:97]]
    found = []
    for number, (prompt, owner) in enumerate(itertools.product(prompts, (b"one", b"two"))):
        settings = drawn if number % 3 == 2 else [greedy]
        found.append(Submit(number, prompt, settings, namespace=owner))
    return found


def clean(loaded: Loaded, scheduler: Scheduler, step: Step | None) -> int:
    return 0


def poison(loaded: Loaded, scheduler: Scheduler, step: Step | None) -> int:
    """Of a step that is scheduled and not launched; None: before it is scheduled."""
    pool = scheduler.pool
    if step is None:
        free = [b for b in range(NUM_BLOCKS) if not pool.holders(b) and b not in pool._cached]
        return sum(spoil(loaded, block, 0) for block in free)
    spoiled = 0
    # What the step itself moves before it computes is still to be read from, or to be written to.
    moved = {block for source, target, _ in step.copies for block in (source, target)}
    moved |= {block for block, _, _ in step.stores} | {block for _, block, _ in step.loads}
    for row in step.rows:
        for page, block in enumerate(row.sequence.block_table):
            computed = max(0, row.start - page * BLOCK)
            if computed < BLOCK and pool.holders(block) == 1 and block not in moved:
                spoiled += spoil(loaded, block, computed)
    return spoiled


def spoil(loaded: Loaded, block: int, first: int) -> int:
    """Numbers that would show: far from any key or value, but finite, as all pages' are."""
    cache = loaded.runner.cache
    for layer in cache.layers:
        layer[:, block, :, first:] = 100 if layer.dtype == torch.int8 else 1e4
    for scales in cache.scales:
        scales[:, block, :, first:] = 100.0
    return BLOCK - first


def run(loaded: Loaded, wanted: list[Submit], spoils: Poison, *, caches: bool = True) -> Answers:
    for pages in (*loaded.runner.cache.layers, *loaded.runner.cache.scales):
        pages.zero_()
    loaded.runner._kept.clear()  # by number of the request, and each scheduler counts from 0
    limits, host = loaded.limits, HostSlots(loaded.num_host_slots)
    scheduler = Scheduler(
        BlockPool(NUM_BLOCKS, BLOCK, enable_prefix_caching=caches, host=host),
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        max_model_len=limits.max_model_len,
    )
    answers: Answers = {}
    waiting = list(wanted)
    for number in itertools.count():
        if waiting and number % 3 == 0:
            scheduler.add(waiting.pop(0))
        spoils(loaded, scheduler, None)
        step = scheduler.schedule()
        if step is None:
            if not waiting:
                break
            continue
        spoils(loaded, scheduler, step)
        deliveries = scheduler.update(step, loaded.runner.run(step))
        for output in itertools.chain.from_iterable(deliveries.values()):
            answers.setdefault((output.id, output.choice), []).append(output)
    counters = scheduler.counters
    assert len(wanted) == 1 or counters.preemptions
    assert len(wanted) == 1 or not caches or counters.prefix_hits
    return answers


def told(answers: Answers) -> dict[tuple[int, int], object]:
    """To the last bit; without the clock."""
    return {
        key: [
            (
                one.tokens,
                one.finish_reason,
                [(p.logprob, p.top_logprobs) for p in one.logprobs or []],
            )
            for one in outputs
        ]
        for key, outputs in answers.items()
    }


@pytest.mark.parametrize("caches", [True, False], ids=["cache", "no-cache"])
def test_what_lies_in_pages_of_others_changes_no_bit(loaded: Loaded, caches: bool) -> None:
    wanted = submits()
    spoiled = run(loaded, wanted, poison, caches=caches)
    assert told(spoiled) == told(run(loaded, wanted, clean, caches=caches))
    assert all(outputs[-1].finish_reason == "length" for outputs in spoiled.values())


def test_each_says_what_it_says_alone_on_a_fresh_engine(loaded: Loaded) -> None:
    spoiled = run(loaded, submits(), poison)
    for submit in submits():
        for key, outputs in run(loaded, [submit], clean).items():
            expected = [token for one in outputs for token in one.tokens]
            assert [token for one in spoiled[key] for token in one.tokens] == expected, key


def test_a_single_position_read_too_many_would_show(loaded: Loaded) -> None:
    """The measure itself: one of a sequence's own positions spoiled, once."""
    submit = submits()[0]

    def spoil_one(loaded: Loaded, scheduler: Scheduler, step: Step | None) -> int:
        row = step.rows[0] if step is not None else None
        if row is None or row.start != 125:
            return 0
        cache = loaded.runner.cache
        for layer in cache.layers:
            layer[:, row.sequence.block_table[0], :, 3] = 100 if layer.dtype == torch.int8 else 1e4
        return 1

    whole = told(run(loaded, [submit], clean))
    assert told(run(loaded, [submit], spoil_one)) != whole
