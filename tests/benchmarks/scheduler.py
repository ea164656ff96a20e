"""What scheduling costs: ``python -m tests.benchmarks.scheduler``. No model, no tensors.

Prints microseconds of schedule() and update() a step with all sequences decoding, first come, first
served and under fair shares of one account and of several, and what it takes to admit long prompts.
"""

from __future__ import annotations

import statistics
import time

from service.engine.blocks import BlockPool
from service.engine.messages import SamplingSettings, Submit
from service.engine.scheduler import Policy, Scheduler
from service.engine.step import Draw, RowResult, Step, StepResult

STEPS = 512  # every sequence crosses two pages and sixteen grains


def draw(step: Step) -> StepResult:
    return StepResult([RowResult([Draw(7)] * len(row.choices)) for row in step.rows])


def timed_steps(scheduler: Scheduler, num_steps: int) -> tuple[list[float], list[float]]:
    """Microseconds of schedule and of update, a step."""
    scheduling, updating = [], []
    for _ in range(num_steps):
        began = time.perf_counter()
        step = scheduler.schedule()
        planned = time.perf_counter()
        if step is None:
            break
        result = draw(step)
        drawn = time.perf_counter()
        scheduler.update(step, result)
        scheduling.append((planned - began) * 1e6)
        updating.append((time.perf_counter() - drawn) * 1e6)
    return scheduling, updating


SHARING: tuple[tuple[Policy, int], ...] = (("fcfs", 1), ("fair", 1), ("fair", 8), ("fair", 1000))


def called(policy: Policy, num_accounts: int) -> str:
    return policy if policy == "fcfs" else f"{policy}, {num_accounts} accounts"


def decoding(num_seqs: int, policy: Policy, num_accounts: int) -> None:
    pool = BlockPool(16 * num_seqs, 256)
    scheduler = Scheduler(
        pool,
        max_num_seqs=num_seqs,
        max_num_batched_tokens=1 << 20,
        max_model_len=4096,
        policy=policy,
    )
    settings = SamplingSettings(max_tokens=2048, eos_token_ids=(2,))
    for number in range(num_seqs):
        account = str(number % num_accounts)
        scheduler.add(Submit(number, [number + 3] * 300, [settings], account=account))
    timed_steps(scheduler, 1)
    scheduling, updating = timed_steps(scheduler, STEPS)
    print(
        f"{num_seqs:5} decoding: schedule {statistics.median(scheduling):6.0f} us, "
        f"update {statistics.median(updating):6.0f} us, "
        f"both {statistics.median(map(sum, zip(scheduling, updating, strict=True))):6.0f} us; "
        f"worst {max(map(sum, zip(scheduling, updating, strict=True))):6.0f} us "
        f"({called(policy, num_accounts)})"
    )


def queueing(num_waiting: int, policy: Policy, num_accounts: int, num_seqs: int = 256) -> None:
    """A pool so full that nobody waiting can be admitted: the head is tried at every step."""
    pool = BlockPool(2 * num_seqs + 4 + 1, 256)
    scheduler = Scheduler(
        pool,
        max_num_seqs=2 * num_seqs,
        max_num_batched_tokens=1 << 20,
        max_model_len=4096,
        max_queued_tokens=1 << 30,
        policy=policy,
    )
    for number in range(num_seqs + num_waiting):
        prompt = [number + 3] * (257 if number < num_seqs else 3000)
        settings = [SamplingSettings(max_tokens=200)]
        scheduler.add(Submit(number, prompt, settings, account=str(number % num_accounts)))
    timed_steps(scheduler, 1)
    num_waiting = len(scheduler._waiting)  # of 1,000 accounts other ones are let in
    scheduling, updating = timed_steps(scheduler, 150)
    both = [sum(pair) for pair in zip(scheduling, updating, strict=True)]
    print(
        f"{num_seqs:5} decoding, {num_waiting} waiting: both {statistics.median(both):6.0f} us "
        f"({called(policy, num_accounts)})"
    )


def admitting(prompt: int) -> None:
    """The first time (hashed, all computed) and again (hashed, all found)."""
    pool = BlockPool(2 * prompt // 256 + 4, 256)
    scheduler = Scheduler(
        pool, max_num_seqs=8, max_num_batched_tokens=1 << 20, max_model_len=1 << 20
    )
    took = []
    for number in range(2):
        scheduler.add(Submit(number, list(range(prompt)), [SamplingSettings(max_tokens=1)]))
        scheduling, updating = timed_steps(scheduler, 1)
        took.append((scheduling[0] + updating[0]) / 1e3)
    print(f"prompt of {prompt:6}: first {took[0]:6.2f} ms, repeated {took[1]:6.2f} ms")


if __name__ == "__main__":
    for num_seqs in (32, 64, 256, 1024):
        for policy, num_accounts in SHARING[:3]:
            decoding(num_seqs, policy, num_accounts)
    for policy, num_accounts in SHARING:
        queueing(700, policy, num_accounts)
    for prompt in (1_000, 8_000, 100_000):
        admitting(prompt)
