"""The worker's loop over a real socket, with a real scheduler and a runner that only counts."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from service.engine.blocks import BlockPool
from service.engine.connections import Connections
from service.engine.flight_recorder import FlightRecorder
from service.engine.framing import FrameReader, encode_frame
from service.engine.loop import UNSEEN_STEP, EngineLoop
from service.engine.messages import (
    Accepted,
    Cancel,
    Control,
    FromEngine,
    Output,
    Outputs,
    Refused,
    Reply,
    SamplingSettings,
    State,
    Submit,
    ToEngine,
)
from service.engine.options import EngineOptions
from service.engine.pulse import Pulse
from service.engine.rates import StepRates
from service.engine.scheduler import Scheduler
from service.engine.step import Draw, RowResult, Step, StepResult

ROOT = Path(__file__).resolve().parents[2]
POISON, FATAL, SLOW = 90, 91, 92  # prompts that begin so make a step fail, or take its time
NUM_BLOCKS = 65
MODEL_SECONDS = 0.015
RUNS_AHEAD = False


class Fatal(Exception):
    pass


@pytest.fixture(autouse=True, params=[False, True], ids=["in_turn", "ahead"])
def runs_ahead(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Every promise of the loop holds both ways."""
    monkeypatch.setattr(sys.modules[__name__], "RUNS_AHEAD", request.param)
    return bool(request.param)


@dataclass
class CountingRunner:
    """Draws each sequence's length; knows a few poisons. ``memory`` does for so many tokens."""

    delay: float = 0.0
    steps: list[int] = field(default_factory=list)
    num_ahead: int = 0  # launched while another was under way
    num_abandoned: int = 0
    num_freed: int = 0
    memory: int = 1_000_000
    rows: list[list[int]] = field(default_factory=list)  # requests of each step

    def launch(self, step: Step, before: Step | None) -> Step:
        assert before is not None or all(row.token_from is None for row in step.rows)
        self.num_ahead += before is not None
        self.steps.append(step.num_tokens)
        self.rows.append([row.sequence.id for row in step.rows])
        if step.num_tokens > self.memory:
            raise MemoryError
        time.sleep(self.delay)
        first = {row.sequence.tokens[0] for row in step.rows}
        if POISON in first:
            raise ValueError("a step that cannot be computed")
        if FATAL in first:
            raise Fatal
        if SLOW in first:
            time.sleep(2.5)
        return step

    def collect(self, launched: Step) -> StepResult:
        rows = [
            RowResult([Draw(len(row.sequence.tokens)) for _ in row.choices])
            for row in launched.rows
        ]
        return StepResult(rows, model_seconds=MODEL_SECONDS)

    def is_fatal(self, error: Exception) -> bool:
        return isinstance(error, Fatal)

    def lacks_memory(self, error: Exception) -> bool:
        return isinstance(error, MemoryError)

    def abandon(self, step: Step) -> None:
        self.num_abandoned += 1

    def free_memory(self) -> None:
        self.num_freed += 1


class Caller:
    """A front end with a blocking socket."""

    def __init__(self, path: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(10)
        self.socket.connect(path)
        self.reader: FrameReader[FromEngine] = FrameReader(FromEngine)
        self.heard: list[FromEngine] = []

    def say(self, *messages: ToEngine) -> None:
        self.socket.sendall(b"".join(encode_frame(message) for message in messages))

    def hear(self) -> FromEngine:
        while not self.heard:
            data = self.socket.recv(65536)
            if not data:
                raise ConnectionResetError
            self.heard += self.reader.feed(data)
        return self.heard.pop(0)

    def hear_outputs(self) -> Outputs:
        while not isinstance(message := self.hear(), Outputs):
            pass
        return message

    def hear_state(self, **fields: object) -> State:
        """The next state that has these fields."""
        while True:
            message = self.hear()
            if isinstance(message, State) and all(
                getattr(message, name) == value for name, value in fields.items()
            ):
                return message

    def hear_answer(self) -> Accepted | Refused:
        while not isinstance(message := self.hear(), Accepted | Refused):
            pass
        return message

    def hear_end(self, number: int) -> Output:
        while True:
            for output in self.hear_outputs().outputs:
                if output.id == number and output.finish_reason:
                    return output


@dataclass
class Served:
    path: str
    thread: threading.Thread
    codes: list[int]
    runner: CountingRunner
    callers: list[Caller] = field(default_factory=list)

    def call(self) -> Caller:
        self.callers.append(Caller(self.path))
        return self.callers[-1]

    def exit_code(self) -> int:
        self.thread.join(10)
        return self.codes[0]


@contextmanager
def serving(
    folder: Path, delay: float = 0.0, recorder: FlightRecorder | None = None, **bounds: int
) -> Iterator[Served]:
    path = str(folder / "engine.sock")
    connections = Connections(path)
    pulse = Pulse(connections)
    pulse.start()
    sizes = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "max_model_len": 256, **bounds}
    scheduler = Scheduler(BlockPool(NUM_BLOCKS, 32), **sizes)  # type: ignore[arg-type]
    runner, codes = CountingRunner(delay), []
    loop = EngineLoop(
        connections,
        pulse,
        scheduler,
        runner,
        StepRates(),
        {"device": "none"},
        runs_ahead=RUNS_AHEAD,
        recorder=recorder,
    )
    thread = threading.Thread(target=lambda: codes.append(loop.run()))
    thread.start()
    served = Served(path, thread, codes, runner)
    try:
        yield served
    finally:
        if thread.is_alive():
            served.call().say(Control(0, "shutdown"))
        thread.join()
        for caller in served.callers:
            caller.socket.close()
        pulse.stop()
        connections.close()
        assert not Path(path).exists()


def ask(number: int, first: int = 1, length: int = 5, max_tokens: int = 3, n: int = 1) -> Submit:
    settings = [SamplingSettings(max_tokens=max_tokens, choice=i) for i in range(n)]
    return Submit(number, [first, *range(length - 1)], settings)


def test_a_newcomer_hears_the_state_at_once(tmp_path: Path) -> None:
    with serving(tmp_path) as engine:
        state = engine.call().hear()
        assert isinstance(state, State)
        assert (state.stage, state.free_blocks, state.block_size) == ("ready", NUM_BLOCKS - 1, 32)
        assert state.facts == {"device": "none"}


def test_an_idle_engine_beats_at_least_once_a_second_and_runs_no_step(tmp_path: Path) -> None:
    with serving(tmp_path) as engine:
        caller = engine.call()
        caller.hear_state()
        began, used = time.monotonic(), time.thread_time()
        caller.hear_state()
        caller.hear_state()
        assert time.monotonic() - began < 2.6
        assert time.thread_time() - used < 0.5
        assert engine.runner.steps == []


def test_an_engine_in_a_long_step_beats_too(tmp_path: Path) -> None:
    with serving(tmp_path) as engine:
        caller = engine.call()
        caller.say(ask(1, first=SLOW, max_tokens=1))
        caller.hear_answer()
        seen = [caller.hear_state(), caller.hear_state()]
        assert all(state.step_elapsed > 0 for state in seen)
        assert seen[0].step_estimate == UNSEEN_STEP  # of this size none was seen: it may compile
        assert caller.hear_end(1).finish_reason == "length"


def test_the_answer_comes_before_any_token_and_every_step_is_one_message(tmp_path: Path) -> None:
    with serving(tmp_path) as engine:
        caller = engine.call()
        caller.say(ask(1), ask(2, n=2))
        assert [caller.hear_answer(), caller.hear_answer()] == [Accepted(1), Accepted(2)]
        first = caller.hear_outputs()
        assert [(output.id, output.choice) for output in first.outputs] == [(1, 0), (2, 0), (2, 1)]
        assert first.num_scheduled_tokens == 10
        second = caller.hear_outputs()
        assert [output.tokens for output in second.outputs] == [[6], [6], [6]]


def test_a_step_is_launched_before_the_one_before_it_is_collected_or_never(
    tmp_path: Path, runs_ahead: bool
) -> None:
    with serving(tmp_path) as engine:
        caller = engine.call()
        caller.say(ask(1, max_tokens=20))
        caller.hear_end(1)
        assert engine.runner.steps == [5] + [1] * 19
        assert engine.runner.num_ahead == (19 if runs_ahead else 0)


def test_time_outside_the_network_is_counted_and_idle_time_is_not(tmp_path: Path) -> None:
    with serving(tmp_path, delay=0.02) as engine:
        caller = engine.call()
        for number in range(2):
            time.sleep(0.3)
            caller.say(ask(number, max_tokens=10))
            caller.hear_end(number)
        counters = caller.hear_state(running=0, waiting=0).counters
    assert 20 * 0.02 < counters["step_seconds"] < 20 * 0.02 + 0.3
    model_seconds = counters["step_seconds"] - counters["gap_seconds"]
    # Ahead, a runner that computes in ``launch`` is in its next step before the last one is back.
    assert -0.001 < 20 * MODEL_SECONDS - model_seconds < 2 * MODEL_SECONDS


def test_what_can_never_run_is_refused(tmp_path: Path) -> None:
    with serving(tmp_path) as engine:
        caller = engine.call()
        caller.say(ask(1, length=300))
        refused = caller.hear_answer()
        assert isinstance(refused, Refused)
        assert (refused.kind, refused.code) == ("ContextLengthExceeded", "context_length_exceeded")


def test_more_than_the_queue_holds_is_refused_with_a_time(tmp_path: Path) -> None:
    with serving(tmp_path, delay=0.01, max_queued_requests=2, max_num_seqs=1) as engine:
        caller = engine.call()
        caller.say(*(ask(i, max_tokens=100) for i in range(8)))
        answers = [caller.hear_answer() for _ in range(8)]
        refused = [answer for answer in answers if isinstance(answer, Refused)]
        assert 4 <= len(refused) <= 5
        assert {(answer.kind, answer.code) for answer in refused} == {("Overloaded", "queue_full")}
        assert all((answer.retry_after or 0) >= 1 for answer in refused)


def test_a_cancelled_request_frees_its_blocks_within_a_step(tmp_path: Path) -> None:
    with serving(tmp_path, delay=0.01) as engine:
        caller = engine.call()
        caller.say(ask(1, max_tokens=200, n=2))
        caller.hear_state(running=2)
        caller.say(Cancel(1, 0))
        caller.hear_state(running=1)
        num_steps = len(engine.runner.steps)
        caller.say(Cancel(1))
        state = caller.hear_state(running=0)
        assert state.free_blocks == NUM_BLOCKS - 1
        assert len(engine.runner.steps) - num_steps <= 2


def test_a_lost_connection_cancels_what_it_owns_and_nothing_else(tmp_path: Path) -> None:
    with serving(tmp_path, delay=0.01) as engine:
        stays, leaves = engine.call(), engine.call()
        stays.say(ask(1, max_tokens=100))
        leaves.say(ask(1, max_tokens=200), ask(2, max_tokens=200))
        stays.hear_state(running=3)
        leaves.socket.close()
        stays.hear_state(running=1)
        assert stays.hear_end(1).finish_reason == "length"


def test_what_is_not_the_protocol_costs_only_its_own_connection(tmp_path: Path) -> None:
    with serving(tmp_path) as engine:
        stranger, caller = engine.call(), engine.call()
        stranger.socket.sendall(b"GET / HTTP/1.1\r\n\r\n")
        with pytest.raises(ConnectionResetError):
            stranger.hear_state(stage="none")
        caller.say(ask(1))
        assert caller.hear_answer() == Accepted(1)


def test_a_step_that_fails_costs_its_requests_and_the_engine_goes_on(tmp_path: Path) -> None:
    with serving(tmp_path) as engine:
        caller = engine.call()
        caller.say(ask(1, first=POISON))
        ended = caller.hear_end(1)
        assert (ended.finish_reason, bool(ended.error)) == ("error", True)
        caller.say(ask(2))
        assert caller.hear_end(2).finish_reason == "length"
        state = caller.hear_state(running=0, waiting=0)
        assert state.free_blocks == NUM_BLOCKS - 1
        assert state.counters["failed_steps"] == 1


def test_a_draining_engine_refuses_and_finishes(tmp_path: Path) -> None:
    with serving(tmp_path, delay=0.005) as engine:
        caller = engine.call()
        owed = replace(ask(3), is_owed=True)
        caller.say(ask(1, max_tokens=50), Control(7, "drain"), ask(2), owed)
        assert caller.hear_answer() == Accepted(1)
        refused = caller.hear_answer()
        assert isinstance(refused, Refused)
        assert (refused.kind, refused.code) == ("Unavailable", "draining")
        assert caller.hear_answer() == Accepted(3)
        assert caller.hear_end(1).finish_reason == "length"


def test_a_reader_that_stopped_reading_stalls_nobody(tmp_path: Path) -> None:
    with serving(tmp_path) as engine:
        deaf, caller = engine.call(), engine.call()
        deaf.say(*(ask(i, max_tokens=200) for i in range(50)))
        caller.say(ask(1, max_tokens=200))
        assert caller.hear_end(1).finish_reason == "length"
        assert [deaf.hear_end(i).finish_reason for i in (0, 49)] == ["length", "length"]


def test_a_ping_is_answered_between_steps(tmp_path: Path) -> None:
    with serving(tmp_path) as engine:
        caller = engine.call()
        caller.say(Control(5, "ping"))
        while not isinstance(message := caller.hear(), Reply):
            pass
        assert message.id == 5


def test_a_model_that_is_not_there_is_one_clear_line_and_an_exit_code(tmp_path: Path) -> None:
    options = EngineOptions(model=str(tmp_path / "none"), socket=str(tmp_path / "engine.sock"))
    process = subprocess.Popen(
        [sys.executable, "-m", "service.engine.worker"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stderr is not None
    try:
        process.stdin.write(msgspec.json.encode(options) + b"\n")
        process.stdin.flush()
        while not Path(options.socket).exists():
            time.sleep(0.01)
        caller = Caller(options.socket)
        assert caller.hear_state().stage == "loading"
        failed = caller.hear_state(stage="failed")
        caller.socket.close()
        assert "no such file or folder" in failed.reason
        assert process.wait(10) == 3
        lines = process.stderr.read().decode().splitlines()
        assert len(lines) == 1
        assert "Traceback" not in lines[0]
    finally:
        process.kill()
        process.stdin.close()
        process.stderr.close()
        process.wait()
    assert not Path(options.socket).exists()
