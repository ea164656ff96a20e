"""What an engine's death costs: those that had seen nothing of their answer notice only the time.

Real processes that really die; the scripted engine says how.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any

import pytest

from service.engine.attempt import Attempt
from service.engine.client import EngineClient
from service.engine.generation import Generation
from service.engine.messages import DEADLINE, Output, Submit
from service.engine.quarantine import Quarantine
from service.engine.retries import PROBATION, Retries
from service.errors import (
    EngineFailure,
    EngineLost,
    InvalidRequest,
    PoisonRequest,
    PronkError,
    Unavailable,
)
from tests.engine import scripted_engine as script
from tests.engine.test_client import (
    NEVER,
    QUICK,
    kill,
    own_temporary_folder,
    read_all,
    script_has_answered,
    scripted,
    serving,
    settings,
    states,
    until,
)

__all__ = ["own_temporary_folder"]  # a fixture
LONG = 100_000  # ticks: until somebody kills the engine


async def ask(
    client: EngineClient, *prompt: int, max_tokens: int = 3, n: int = 1, **fields: Any
) -> list[Output]:
    async with client.submit([*prompt], settings(max_tokens, n), **fields) as generation:
        return [output async for output in generation]


async def fail(work: Coroutine[Any, Any, object]) -> BaseException:
    try:
        await work
    except PronkError as error:
        return error
    raise AssertionError("it did not fail")


def tokens(outputs: list[Output], choice: int = 0) -> list[int]:
    return [token for output in outputs if output.choice == choice for token in output.tokens]


def in_engine(client: EngineClient) -> int:
    return sum(attempt.is_in_engine for attempt in client._attempts.values())


def on_trial(client: EngineClient) -> int:
    attempts = client._attempts.values()
    return sum(attempt.is_in_engine and not attempt.passed.is_set() for attempt in attempts)


async def started(
    client: EngineClient, *asked: Coroutine[Any, Any, Any]
) -> list[asyncio.Task[Any]]:
    """Tasks whose requests the engine has accepted."""
    before = len(client._attempts)
    tasks = [asyncio.create_task(one) for one in asked]
    await until(
        lambda: (
            len(client._attempts) == before + len(asked)
            and all(attempt.admission.done() for attempt in client._attempts.values())
        )
    )
    return tasks


async def test_who_had_seen_nothing_gets_the_whole_answer_from_the_next_engine() -> None:
    async with serving() as client:
        told = states(client)
        waiting = [ask(client, script.WAIT, 100, max_tokens=4, n=2) for _ in range(3)]
        running = [ask(client, script.SLOW, 100, i, max_tokens=4) for i in range(3)]
        tasks = await started(client, *running, *waiting)
        kill(client)
        answers = await asyncio.gather(*tasks)
        assert [tokens(answer) for answer in answers] == [[0, 1, 2, 3]] * 6
        assert [tokens(answer, 1) for answer in answers[3:]] == [[0, 1, 2, 3]] * 3
        assert all([o.finish_reason for o in answer][-1] == "length" for answer in answers)
        assert (client.num_retried, client.num_restarts, client.num_unfinished) == (6, 1, 0)
        assert client.restarts["killed"] == 1
        restarting = [state.reason for state in told if state.stage == "restarting"]
        assert any("signal 9" in reason for reason in restarting)
        assert [state.stage for state in told][-1] == "ready"


async def test_who_had_seen_something_gets_one_error_and_what_had_come_unread_is_made_anew() -> (
    None
):
    async with serving() as client:
        (reader,) = await started(client, fail(read_all(client, [script.COUNT])))
        await until(lambda: script_has_answered(client, 1))
        async with client.submit([script.COUNT], settings(120)) as generation:
            await until(lambda: generation.num_tokens > 3)  # nobody reads
            kill(client)
            assert isinstance(await reader, EngineFailure)
            outputs = [output async for output in generation]
        assert tokens(outputs) == [*range(120)]
        assert client.num_discarded > 3  # what the first engine had said is accounted for


async def test_newcomers_are_refused_while_there_is_no_engine_and_while_suspects_are_tried() -> (
    None
):
    async with serving() as client:
        tasks = await started(client, ask(client, script.SLOW, 60), ask(client, script.SLOW, 60, 1))
        kill(client)
        await until(lambda: client.state.stage == "restarting")
        refusals = 0
        while not all(task.done() for task in tasks):
            if not client.is_ready:
                with pytest.raises(Unavailable) as refusal:
                    await ask(client, script.COUNT)
                assert refusal.value.retry_after is not None
                assert refusal.value.code in ("engine_restarting", "loading")
                refusals += 1
            await asyncio.sleep(0.02)
        assert refusals > 3
        assert tokens(await ask(client, script.COUNT)) == [0, 1, 2]


async def test_suspects_run_alone_and_one_after_the_other() -> None:
    async with serving() as client:
        most = [0]
        tasks = await started(client, *(ask(client, script.SLOW, 20, i) for i in range(4)))
        kill(client)
        await until(lambda: client.state.stage == "restarting")
        client.observers.append(lambda _: most.append(on_trial(client)))
        await asyncio.gather(*tasks)
        assert max(most) == 1


async def test_poison_is_told_from_its_company_and_refused_from_then_on() -> None:
    async with serving() as client:
        innocent = [ask(client, script.SLOW, 40, i, max_tokens=5) for i in range(4)]
        queued = [ask(client, script.WAIT, 40, i, max_tokens=5) for i in range(2)]
        tasks = await started(client, *innocent[:2], *queued)
        tasks += [asyncio.create_task(fail(ask(client, script.POISON, 0)))]
        tasks += [asyncio.create_task(one) for one in innocent[2:]]
        *answers, poison, third, fourth = await asyncio.gather(*tasks)
        assert [tokens(answer) for answer in (*answers, third, fourth)] == [[*range(5)]] * 6
        assert isinstance(poison, PoisonRequest)
        await client.wait_ready()
        assert client.num_restarts == 2
        for _ in range(3):  # with other seeds, as the server draws them
            refusal = await fail(ask(client, script.POISON, 0))
            assert isinstance(refusal, PoisonRequest)
            assert (refusal.status, refusal.code) == (400, "poison_request")
        assert client.num_poisonous == 4
        assert client.num_restarts == 2
        assert tokens(await ask(client, script.SLOW, 40, 0)) == [0, 1, 2]


async def test_poison_that_works_late_is_convicted_when_its_client_sends_it_again() -> None:
    async with serving() as client:
        bystanders = [fail(read_all(client, [script.COUNT, i])) for i in range(3)]
        tasks = await started(client, *bystanders)
        await until(lambda: script_has_answered(client, 3))
        assert type(await fail(ask(client, script.POISON, 5, max_tokens=NEVER))) is EngineLost
        assert [type(one) for one in await asyncio.gather(*tasks)] == [EngineLost] * 3
        await client.wait_ready()
        # All of them come back at once, as clients do that try again by themselves.
        tasks = await started(
            client, *(fail(read_all(client, [script.COUNT, i])) for i in range(3))
        )
        poison = fail(ask(client, script.POISON, 5, max_tokens=NEVER))
        assert isinstance(await poison, PoisonRequest)
        assert [type(one) for one in await asyncio.gather(*tasks)] == [EngineLost] * 3
        await client.wait_ready()
        tasks = await started(client, *(read_all(client, [script.COUNT, i]) for i in range(3)))
        await until(lambda: script_has_answered(client, 3))
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert client.num_restarts == 2


async def test_who_only_waits_while_engines_die_is_tried_until_one_computes_it() -> None:
    async with serving(patience=replace(QUICK, restart_delay=0.01)) as client:
        tasks = await started(client, *(ask(client, script.WAIT, 150, i) for i in range(2)))
        for round_ in range(3):
            kill(client)
            await until(lambda: client.num_restarts == round_ + 1 and client.is_ready)  # noqa: B023
            assert in_engine(client) == 2
        assert [tokens(one) for one in await asyncio.gather(*tasks)] == [[0, 1, 2]] * 2


async def test_an_engine_that_dies_over_a_retry_ends_it_with_one_error() -> None:
    async with serving(patience=replace(QUICK, restart_delay=0.01)) as client:
        tasks = await started(client, fail(ask(client, script.SLOW, LONG)))
        kill(client)
        await until(lambda: client.num_restarts == 1 and in_engine(client) == 1)
        await until(lambda: client._supervisor.watchdog.state.running == 1)
        kill(client)
        assert isinstance(await tasks[0], PoisonRequest)
        assert client.num_unfinished == 0


async def test_a_deadline_that_passes_without_an_engine_is_a_partial_answer() -> None:
    async with serving(patience=replace(QUICK, restart_delay=5.0, max_restart_delay=5.0)) as client:
        asked = ask(client, script.WAIT, LONG, n=2, deadline=0.4)
        queued = ask(client, script.WAIT, LONG, max_queue=0.4)
        tasks = await started(client, asked, queued)
        kill(client)
        answers = await asyncio.gather(*tasks)
        ends = [[(o.choice, o.finish_reason, o.stop_reason) for o in one] for one in answers]
        assert ends == [
            [(0, "length", DEADLINE), (1, "length", DEADLINE)],
            [(0, "length", DEADLINE)],
        ]
        assert [tokens(answer) for answer in answers] == [[], []]


async def test_a_client_that_hangs_up_meanwhile_is_not_tried_again() -> None:
    async with serving() as client:
        tasks = await started(client, *(ask(client, script.SLOW, LONG, i) for i in range(3)))
        kill(client)
        await until(lambda: client.state.stage == "restarting")
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert client.num_unfinished == 0
        await client.wait_ready()
        assert (client.num_retried, client.state.running) == (0, 0)


async def test_patience_for_another_engine_ends() -> None:
    patience = replace(QUICK, restart_delay=5.0, max_restart_delay=5.0, retry=0.2)
    async with serving(patience=patience) as client:
        tasks = await started(client, fail(ask(client, script.SLOW, LONG)))
        kill(client)
        assert "was not back" in str(await tasks[0])


async def test_an_engine_that_is_given_up_fails_those_that_wait_for_it() -> None:
    async with serving(patience=replace(QUICK, max_restarts=0)) as client:
        tasks = await started(client, fail(ask(client, script.SLOW, LONG)))
        kill(client)
        assert type(await tasks[0]) is EngineFailure
        assert client.state.stage == "failed"


async def test_stopping_fails_those_that_wait_for_an_engine() -> None:
    async with serving(patience=replace(QUICK, restart_delay=5.0, max_restart_delay=5.0)) as client:
        tasks = await started(client, fail(ask(client, script.SLOW, LONG)))
        kill(client)
        await until(lambda: client.state.stage == "restarting")
        await client.stop()
        assert type(await tasks[0]) is EngineFailure


async def test_a_draining_server_still_ends_what_it_accepted_by_another_engine() -> None:
    async with serving() as client:
        tasks = await started(client, ask(client, script.SLOW, 60), ask(client, script.WAIT, 60))
        drain = asyncio.create_task(client.drain())
        await asyncio.sleep(0.01)
        kill(client)
        answers = await asyncio.gather(*tasks)
        assert [tokens(answer) for answer in answers] == [[0, 1, 2]] * 2
        await drain


async def test_a_drain_begun_while_there_is_no_engine_refuses_nobody_who_was_accepted() -> None:
    async with serving() as client:
        tasks = await started(client, ask(client, script.SLOW, 60), ask(client, script.WAIT, 60))
        kill(client)
        await until(lambda: client.state.stage == "restarting")
        await until(lambda: client._supervisor.is_connected)  # the next one hears of the drain
        drain = asyncio.create_task(client.drain())
        answers = await asyncio.gather(*tasks)
        assert [tokens(answer) for answer in answers] == [[0, 1, 2]] * 2
        await drain


async def test_a_suspect_waits_for_its_turn_no_longer_than_its_deadline() -> None:
    retries = Retries(Quarantine(), 300.0, lambda attempt: None)

    def attempt(number: int, deadline: float | None) -> Attempt:
        submit = Submit(number, [number], settings(1), deadline=deadline)
        generation = Generation(number, 1, lambda choice: None)
        return Attempt(submit, generation, asyncio.get_running_loop().create_future())

    await retries.wait_turn(attempt(1, None), 0)  # it never passes
    second = attempt(2, 0.05)
    async with asyncio.timeout(PROBATION / 2):
        await retries.wait_turn(second, 0)
    left = second.due({}).deadline
    assert left is not None
    assert left < 0.05, "the wait is not made good by the engine"


async def test_what_goes_on_with_an_answer_waits_for_the_next_engine() -> None:
    """A beam's next round, a prompt of a later wave: the client has been promised an answer."""
    async with serving() as client:
        kill(client)
        await until(lambda: client.state.stage == "restarting")
        assert tokens(await ask(client, script.COUNT, is_continuation=True)) == [0, 1, 2]


async def test_an_engine_out_of_memory_is_counted_as_that_and_replaced() -> None:
    """Really: under a limit of its address space it takes what there is."""
    async with serving() as client:
        (bystander,) = await started(client, ask(client, script.SLOW, 30))
        assert isinstance(await fail(ask(client, script.HOG)), PoisonRequest)
        assert tokens(await bystander) == [0, 1, 2]
        assert client.restarts["out_of_memory"] == client.num_restarts == 2


async def test_a_refusal_of_the_retry_reaches_the_client() -> None:
    """The next engine cannot load the adapter that was asked for."""
    async with serving() as client:
        asked = ask(client, script.SLOW, LONG, adapter="gone", adapter_version=1)
        tasks = await started(client, fail(asked))
        kill(client)
        assert "gone" in str(await tasks[0])


async def test_deaths_leave_no_descriptor_no_memory_and_no_task_behind() -> None:
    async with serving() as client:
        gc.collect()
        before = len(os.listdir("/proc/self/fd")), len(asyncio.all_tasks())
        shared = sorted(os.listdir("/dev/shm"))
        for round_ in range(3):
            tasks = await started(client, ask(client, script.SLOW, 5, round_))
            kill(client, signal.SIGKILL)
            await asyncio.gather(*tasks)
            await client.wait_ready()
        gc.collect()
        assert (len(os.listdir("/proc/self/fd")), len(asyncio.all_tasks())) == before
        assert [name for name in sorted(os.listdir("/dev/shm")) if name not in shared] == []


async def test_a_supervisor_gives_up_on_a_process_that_never_listens() -> None:
    client = scripted(script.NEVER_LISTENS, replace(QUICK, connect=0.5, max_restarts=0, stop=0.1))
    await client.start()
    with pytest.raises(EngineFailure):
        await client.wait_ready()
    await client.stop()


def test_a_poison_refusal_is_a_clients_error() -> None:
    assert issubclass(PoisonRequest, InvalidRequest)
