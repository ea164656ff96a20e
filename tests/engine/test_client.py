"""The client answers every request, whatever becomes of the engine behind it."""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from service.engine.client import EngineClient
from service.engine.messages import Outputs, SamplingSettings, State
from service.engine.options import SOCKET_FOLDER_PREFIX, EngineOptions
from service.engine.process import engine_environment
from service.engine.supervisor import Patience
from service.errors import EngineFailure, EngineLost, Overloaded, PoisonRequest, Unavailable
from tests.engine import scripted_engine as script

QUICK = Patience(restart_delay=0.05, stop=2.0, grace=0.2, watch_interval=0.1)
STRICT = replace(QUICK, stalled_after=2.0)  # an idle engine says something every second
NEVER = 10**9


@pytest.fixture(autouse=True)
def own_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def sockets() -> list[Path]:
    return list(Path(tempfile.gettempdir()).glob(f"{SOCKET_FOLDER_PREFIX}*"))


def scripted(model: str = "", patience: Patience = QUICK) -> EngineClient:
    options = EngineOptions(model=model, socket="", log_level="error")
    return EngineClient(options, patience=patience, worker="tests.engine.scripted_engine")


@asynccontextmanager
async def serving(model: str = "", patience: Patience = QUICK) -> AsyncIterator[EngineClient]:
    client = scripted(model, patience)
    await client.start()
    try:
        await client.wait_ready()
        yield client
    finally:
        await client.stop()
        assert sockets() == []


def settings(max_tokens: int = 3, n: int = 1) -> list[SamplingSettings]:
    return [SamplingSettings(max_tokens=max_tokens, choice=i) for i in range(n)]


async def read_all(client: EngineClient, prompt: list[int]) -> None:
    async with client.submit(prompt, settings(NEVER)) as generation:
        async for _ in generation:
            pass


async def until(condition: Callable[[], object], within: float = 20.0) -> None:
    give_up = time.monotonic() + within
    while not condition():
        assert time.monotonic() < give_up, "did not come to pass"
        await asyncio.sleep(0.01)


def states(client: EngineClient) -> list[State]:
    """All that are announced from now on."""
    heard: list[State] = []
    client.observers.append(lambda m: heard.append(m) if isinstance(m, State) else None)
    return heard


def is_alive(pid: int | None) -> bool:
    assert pid is not None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def test_every_choice_arrives_whole_and_ends_with_its_reason() -> None:
    async with serving() as client, client.submit([script.COUNT], settings(5, n=3)) as generation:
        tokens: dict[int, list[int]] = {0: [], 1: [], 2: []}
        endings = {}
        async for output in generation:
            tokens[output.choice] += output.tokens
            endings[output.choice] = output.finish_reason
        assert set(map(tuple, tokens.values())) == {(0, 1, 2, 3, 4)}
        assert set(endings.values()) == {"length"}


async def test_a_refusal_is_raised_as_the_class_it_names() -> None:
    async with serving() as client:
        with pytest.raises(Overloaded, match="queue is full") as refusal:
            async with client.submit([script.REFUSE], settings()):
                pass
        assert refusal.value.retry_after == 7.0
        assert client.num_unfinished == 0


async def test_leaving_the_block_cancels_what_still_runs() -> None:
    async with serving() as client:
        async with client.submit([script.COUNT], settings(NEVER)) as generation:
            await anext(generation)
        await until(lambda: client.state.running == 0)
        assert client.num_unfinished == 0


async def test_a_stopped_choice_ends_and_the_others_go_on() -> None:
    async with serving() as client:
        async with client.submit([script.COUNT], [*settings(NEVER), *settings(20)]) as generation:
            ended = set()
            async for output in generation:
                generation.stop(0)
                if output.finish_reason:
                    ended.add(output.choice)
        assert ended == {1}
        await until(lambda: client.state.running == 0)


async def test_hanging_up_before_the_answer_cancels_too() -> None:
    async with serving() as client:

        async def ask() -> None:
            async with client.submit([script.IGNORE], settings()):
                raise AssertionError("never accepted")

        task = asyncio.create_task(ask())
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: client.state.counters.get("cancelled") == 1)
        assert client.num_unfinished == 0


async def test_a_burst_for_a_slow_reader_is_merged() -> None:
    async with serving() as client:
        arrived: list[int] = []
        client.observers.append(
            lambda message: (
                arrived.extend(token for output in message.outputs for token in output.tokens)
                if isinstance(message, Outputs)
                else None
            )
        )
        async with client.submit([script.BURST], settings(20_000)) as generation:
            await until(lambda: len(arrived) == 20_000, within=30)
            outputs = [output async for output in generation]
        assert [token for output in outputs for token in output.tokens] == list(range(20_000))
        assert len(outputs) < 200


def kill(client: EngineClient, number: int = signal.SIGKILL) -> None:
    assert client.pid is not None
    os.kill(client.pid, number)


def script_has_answered(client: EngineClient, count: int) -> bool:
    attempts = client._attempts.values()
    return sum(attempt.generation.has_given for attempt in attempts) >= count


async def test_everybody_hears_of_the_engines_death_and_the_next_request_works() -> None:
    async with serving() as client:
        stages: list[str] = []
        client.observers.append(
            lambda message: stages.append(message.stage) if isinstance(message, State) else None
        )
        first = client.pid

        readers = [asyncio.create_task(read_all(client, [script.COUNT])) for _ in range(5)]
        await until(lambda: client.state.running == 5)
        await until(lambda: script_has_answered(client, 5))
        kill(client)
        answers = await asyncio.gather(*readers, return_exceptions=True)
        assert [type(answer) for answer in answers] == [EngineLost] * 5
        with pytest.raises(Unavailable) as refusal:
            async with client.submit([script.COUNT], settings()):
                pass
        assert (refusal.value.code, refusal.value.retry_after is not None) == (
            "engine_restarting",
            True,
        )
        await client.wait_ready()
        assert "restarting" in stages
        assert (client.num_restarts, client.num_unfinished) == (1, 0)
        assert client.pid != first
        async with client.submit([script.COUNT], settings(3)) as generation:
            assert [t async for output in generation for t in output.tokens] == [0, 1, 2]


async def test_an_engine_that_keeps_dying_is_given_up() -> None:
    client = scripted(script.DIES_AT_START, Patience(restart_delay=0.01, max_restarts=1))
    await client.start()
    with pytest.raises(EngineFailure, match="exit code 5"):
        await client.wait_ready()
    assert client.num_restarts == 1
    with pytest.raises(Unavailable):
        async with client.submit([script.COUNT], settings()):
            pass
    await client.stop()


async def test_a_model_that_cannot_be_loaded_is_not_tried_again() -> None:
    client = scripted(script.FAILS_TO_LOAD)
    await client.start()
    with pytest.raises(EngineFailure, match="no such model"):
        await client.wait_ready()
    await client.stop()
    assert client.num_restarts == 0


async def test_before_it_is_ready_requests_are_refused_with_a_time_to_wait() -> None:
    client = scripted()
    await client.start()
    with pytest.raises(Unavailable) as refusal:
        async with client.submit([script.COUNT], settings()):
            pass
    assert refusal.value.code == "loading"
    assert refusal.value.retry_after is not None
    await client.stop()
    assert client.state.stage == "stopped"


async def test_draining_refuses_the_new_and_waits_for_the_old() -> None:
    async with serving() as client:
        async with client.submit([script.COUNT], settings(30)) as generation:
            drain = asyncio.create_task(client.drain())
            await asyncio.sleep(0.02)
            assert client.state.stage == "draining"
            with pytest.raises(Unavailable) as refusal:
                async with client.submit([script.COUNT], settings()):
                    pass
            assert refusal.value.code == "draining"
            assert not drain.done()
            assert [t async for output in generation for t in output.tokens] == list(range(30))
        await drain


@pytest.mark.parametrize("verb", [script.STALL, script.FREEZE])
async def test_a_stuck_engine_turns_unready_then_is_replaced(verb: int) -> None:
    async with serving(patience=STRICT) as client:
        first, told = client.pid, states(client)
        with pytest.raises(PoisonRequest):  # it is tried again, and does it again
            await read_all(client, [verb])
        assert not client.is_ready
        await client.wait_ready()
        assert client.restarts["stalled"] == client.num_restarts == 2
        assert not is_alive(first)
        stalled = next(state for state in told if state.stage == "stalled")
        assert "no " in stalled.reason


async def test_an_engine_stopped_from_outside_is_replaced_too() -> None:
    async with serving(patience=STRICT) as client:
        first = client.pid
        kill(client, signal.SIGSTOP)
        await until(lambda: client.state.stage == "stalled")
        await client.wait_ready()
        assert client.restarts["stalled"] == 1
        assert client.pid != first


async def test_a_step_that_ends_within_the_grace_saves_the_engine() -> None:
    async with serving(patience=replace(STRICT, grace=30.0)) as client:
        first = client.pid
        kill(client, signal.SIGSTOP)
        await until(lambda: client.state.stage == "stalled")
        kill(client, signal.SIGCONT)
        await client.wait_ready()
        assert (client.pid, client.num_restarts) == (first, 0)


async def test_stopping_leaves_no_process_and_fails_who_still_waits() -> None:
    async with serving() as client:
        pid = client.pid
        reader = asyncio.create_task(read_all(client, [script.COUNT]))
        await until(lambda: client.state.running == 1)
        began = time.monotonic()
        await client.stop()
        assert time.monotonic() - began < 1.0, "it left by itself"
        with pytest.raises(EngineFailure):
            await reader
        assert not is_alive(pid)


async def test_an_engine_that_will_not_leave_is_killed() -> None:
    async with serving(patience=Patience(stop=0.2)) as client:
        pid = client.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        await client.stop()
        assert not is_alive(pid)


async def test_signals_of_a_terminal_do_not_reach_the_engine() -> None:
    async with serving() as client:
        assert client.pid is not None
        assert os.getsid(client.pid) != os.getsid(0)


async def test_observers_see_every_step_and_a_broken_one_harms_nobody() -> None:
    async with serving() as client:
        seen: list[Outputs] = []

        def broken(message: Outputs | State) -> None:
            raise ZeroDivisionError

        client.observers.append(broken)
        client.observers.append(lambda m: seen.append(m) if isinstance(m, Outputs) else None)
        async with client.submit([script.COUNT], settings(4)) as generation:
            async for _ in generation:
                pass
        assert [output.tokens for message in seen for output in message.outputs] == [
            [0],
            [1],
            [2],
            [3],
        ]
        assert (await client.ping()).result == {}
        assert client.heartbeat_age() < 1.0


def test_secrets_and_settings_do_not_reach_the_engine() -> None:
    environment = engine_environment(
        {"PRONK_API_KEY": "x", "HF_TOKEN": "y", "PATH": "/bin", "PYTHONPATH": "/elsewhere"}
    )
    assert environment.keys() == {"PATH", "PYTHONPATH", "GOMP_SPINCOUNT"}
    assert environment["PYTHONPATH"].endswith(f"{os.pathsep}/elsewhere")
